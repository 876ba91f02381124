"""What the roles above count on is there."""

import shlex

from testinfra.host import Host

from inferfleet.model import Step


def test_folders_are_there(host: Host, step: Step) -> None:
    """its folders are there, and belong to whom they should"""
    for path, wanted in step.settings["directories"].items():
        found = host.file(path)
        assert found.is_directory, path
        assert found.user == wanted.get("owner", "root"), path
        assert found.mode == int(wanted.get("mode", "0755"), 8), path


def test_kernel_settings_hold(host: Host, step: Step) -> None:
    """kernel settings that the host may set itself are as wanted"""
    for name, value in step.settings["sysctl"].items():
        path = "/proc/sys/" + name.replace(".", "/")
        if host.run("test -w %s", path).rc == 0:
            assert host.file(path).content_string.split() == str(value).split(), name


def test_limits_hold_for_our_services(host: Host, step: Step) -> None:
    """every service of ours has the limit of open files"""
    for name in host.run(
        "systemctl list-units --plain --no-legend 'inferfleet-*.service'"
    ).stdout.splitlines():
        unit = shlex.split(name)[0]
        shown = host.check_output("systemctl show -p LimitNOFILE --value %s", unit)
        assert shown == str(step.settings["open_files"]), unit


def test_the_clock_is_kept(host: Host, step: Step) -> None:
    """the clock is synchronised"""
    if step.settings["time_service"] == "none" or host.run("systemd-detect-virt -q -c").rc == 0:
        return
    shown = host.check_output("timedatectl show -p NTPSynchronized --value")
    assert shown == "yes", "no time server was reached yet"
