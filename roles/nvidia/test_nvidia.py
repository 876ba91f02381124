"""Driver, GPUs and their names for containers are as engines need them."""

from testinfra.host import Host

from inferfleet.model import Step

CONTAINERS = "docker ps -q"


def test_every_gpu_of_the_inventory_is_there(host: Host, step: Step) -> None:
    """the driver works and shows every GPU of the inventory"""
    listed = host.check_output("nvidia-smi -L").splitlines()
    wanted = {gpu.name.partition(":")[0] for gpu in step.host.gpus}
    assert len([line for line in listed if line.startswith("GPU ")]) >= len(wanted)


def test_slices_and_cdi_names_are_there(host: Host, step: Step) -> None:
    """MIG slices and CDI device names are as the inventory says"""
    done = host.run(
        "python3 -I /opt/inferfleet/nvidia/gpus.py check /etc/inferfleet/nvidia/gpus.json"
    )
    assert done.rc == 0, done.stderr


def test_they_will_be_there_after_a_reboot(host: Host, step: Step) -> None:
    """they are made again at every boot"""
    assert host.check_output("systemctl is-enabled inferfleet-gpus.service") == "enabled"


def test_the_fabric_manager_is_the_drivers(host: Host, step: Step) -> None:
    """with NVSwitches, the fabric manager runs in the driver's version"""
    if not host.run("ls /proc/driver/nvidia-nvswitch/devices").stdout.strip():
        return
    driver = host.check_output("nvidia-smi --query-gpu=driver_version --format=csv,noheader -i 0")
    assert host.check_output("nv-fabricmanager --version").split()[-1] == driver
    assert host.check_output("systemctl is-active nvidia-fabricmanager") == "active"


def test_running_containers_see_their_gpus(host: Host, step: Step) -> None:
    """every running container that has GPUs can still use them"""
    for container in host.run(CONTAINERS).stdout.split():
        seen = host.run("docker exec %s nvidia-smi -L", container)
        assert seen.rc in (0, 126, 127), (
            f"{container} has lost its GPUs: docker restart {container}"
        )
