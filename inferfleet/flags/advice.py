"""What to write instead: for names that guides still show and no current release knows.

Checked against the parsers of the releases in the tables; TGI's against every tag from 1.4.0 to
3.3.7 of its launcher, Ollama's against envconfig/config.go of 0.33.0.
"""

from __future__ import annotations

_SPECULATIVE = "write --speculative-config with JSON: model, num_speculative_tokens, method, ..."
_STRUCTURED = 'write --structured-outputs-config with JSON, such as {"backend": "xgrammar"}'
_ALWAYS = "leave it out; the engine does so by itself now"
_V0 = "it belonged to the old engine (V0); leave it out"
_PROMPT_ADAPTER = "prompt adapters are gone; serve LoRA adapters instead"
_HF_OVERRIDES = 'write --hf-overrides with JSON, such as {"rope_scaling": {...}}'
_EPLB = "write --eplb-config with JSON"
_COUNT = "use the options gpus_per_instance, tensor_parallel and pipeline_parallel"

INSTEAD: dict[str, dict[str, str]] = {
    "vllm": {
        "--worker-use-ray": "write --distributed-executor-backend ray",
        "--engine-use-ray": "write --distributed-executor-backend ray",
        "--max-context-len-to-capture": "write --cudagraph-capture-sizes",
        "--quantization-param-path": "leave it out; scales are read from the checkpoint",
        "--use-v2-block-manager": _ALWAYS,
        "--speculative-model": _SPECULATIVE,
        "--num-speculative-tokens": _SPECULATIVE,
        "--ngram-prompt-lookup-max": _SPECULATIVE,
        "--ngram-prompt-lookup-min": _SPECULATIVE,
        "--speculative-draft-tensor-parallel-size": _SPECULATIVE,
        "--speculative-max-model-len": _SPECULATIVE,
        "--speculative-disable-by-batch-size": _SPECULATIVE,
        "--speculative-model-quantization": _SPECULATIVE,
        "--device": "leave it out; the platform is detected",
        "--num-scheduler-steps": _V0,
        "--multi-step-stream-outputs": _V0,
        "--preemption-mode": _V0,
        "--num-lookahead-slots": _V0,
        "--scheduler-delay-factor": _V0,
        "--disable-async-output-proc": _V0,
        "--tokenizer-pool-size": _V0,
        "--tokenizer-pool-type": _V0,
        "--tokenizer-pool-extra-config": _V0,
        "--enable-reasoning": "the option reasoning_parser alone is enough",
        "--enable-prompt-adapter": _PROMPT_ADAPTER,
        "--max-prompt-adapters": _PROMPT_ADAPTER,
        "--max-prompt-adapter-token": _PROMPT_ADAPTER,
        "--prompt-adapters": _PROMPT_ADAPTER,
        "--qlora-adapter-name-or-path": "use the option lora_adapters",
        "--long-lora-scaling-factors": "leave it out; the adapter's own scaling is used",
        "--lora-extra-vocab-size": "merge such adapters into the model",
        "--guided-decoding-backend": _STRUCTURED,
        "--guided-decoding-disable-fallback": _STRUCTURED,
        "--guided-decoding-disable-any-whitespace": _STRUCTURED,
        "--guided-decoding-disable-additional-properties": _STRUCTURED,
        "--rope-scaling": _HF_OVERRIDES,
        "--rope-theta": _HF_OVERRIDES,
        "--max-seq-len-to-capture": "write --max-cudagraph-capture-size or leave it out",
        "--cuda-graph-sizes": "write --cudagraph-capture-sizes",
        "--override-pooler-config": "write --pooler-config",
        "--task": "write --runner pooling, with --convert embed or classify where needed",
        "--disable-mm-preprocessor-cache": "write --mm-processor-cache-gb 0",
        "--enable-multimodal-encoder-data-parallel": "write --mm-encoder-tp-mode data",
        "--swap-space": "leave it out; preempted requests are recomputed, not swapped",
        "--disable-log-requests": "requests are not logged unless --enable-log-requests says so",
        "--disable-frontend-multiprocessing": _ALWAYS,
        "--calculate-kv-scales": "use a checkpoint that holds the scales",
        "--override-attention-dtype": "leave it out",
        "--max-num-partial-prefills": "leave it out; set max_num_batched_tokens",
        "--max-long-partial-prefills": "leave it out; set max_num_batched_tokens",
        "--logits-processor-pattern": "write --logits-processors",
        "--expand-tools-even-if-tool-choice-none": "leave it out, or write "
        "--exclude-tools-when-tool-choice-none for the contrary",
        "--num-redundant-experts": _EPLB,
        "--eplb-window-size": _EPLB,
        "--eplb-step-interval": _EPLB,
        "--eplb-log-balancedness": _EPLB,
        "--shutdown-timeout": "without it, running requests are cut at once",
        "--gpus": _COUNT,
        "--num-gpus": _COUNT,
        "--gpu-count": _COUNT,
        "--n-gpu-layers": "that is llama.cpp's; vLLM keeps all layers on GPUs (--cpu-offload-gb)",
        "--context-length": "use the option max_model_len",
        "--max-context-length": "use the option max_model_len",
        "--ctx-size": "that is llama.cpp's; use the option max_model_len",
        "--num-shard": "that is TGI's; use the option tensor_parallel",
        "--max-total-tokens": "that is TGI's; use the option max_model_len",
        "--max-concurrent-requests": "that is TGI's; use the option max_num_seqs",
        "--messages-api-enabled": "the chat API is always on; leave it out",
        "--mem-fraction-static": "that is SGLang's; use the option gpu_memory_utilization",
        "--tp": "write -tp, or use the option tensor_parallel",
        "--model-path": "the model comes from the deployment's `model`",
        "--model-name": "the name comes from the model's served_name",
        "--enable-tool-choice": "use the option tool_call_parser, which turns it on",
    },
    "tgi": {
        "--messages-api-enabled": "leave it out: the launcher never had it, and the chat API is "
        "always on",
        "--max-model-len": "that is vLLM's; use the option max_total_tokens",
        "--tensor-parallel-size": "that is vLLM's; gpus_per_instance says how many shards",
        "--gpu-memory-utilization": "that is vLLM's; use the option cuda_memory_fraction",
        "--quantization": "that is vLLM's; use the option quantize",
        "--host": "write --hostname; but the role sets where it listens",
        "--model": "the model comes from the deployment's `model`",
    },
    "ollama": {},
}

VARIABLES: dict[str, dict[str, str]] = {
    "vllm": {
        "VLLM_MODEL_PATH": "vLLM reads no such variable; the model comes from the deployment",
        "VLLM_MODEL": "vLLM reads no such variable; the model comes from the deployment",
        "VLLM_TENSOR_PARALLEL_SIZE": "use the option tensor_parallel",
        "VLLM_GPU_MEMORY_UTILIZATION": "use the option gpu_memory_utilization",
        "VLLM_MAX_MODEL_LEN": "use the option max_model_len",
        "VLLM_HOST": "the role sets where it listens",
        "VLLM_ATTENTION_BACKEND": "write --attention-backend in extra_args",
        "VLLM_FLASH_ATTN_VERSION": "write --attention-config.flash_attn_version in extra_args",
        "VLLM_USE_V1": "there is only one engine now; leave it out",
        "VLLM_ALL2ALL_BACKEND": "write --all2all-backend in extra_args",
        "VLLM_TORCH_PROFILER_DIR": "write --profiler-config in extra_args",
        "VLLM_MM_INPUT_CACHE_GIB": "write --mm-processor-cache-gb in extra_args",
        "VLLM_OFFLINE": "use the option offline",
    },
    "tgi": {},
    "ollama": {
        "OLLAMA_GPU": "Ollama has never read it; for the CPU alone set gpus_per_instance: 0",
        "OLLAMA_NUM_GPU": "Ollama has never read it; which GPUs: the deployment's gpus; how many "
        "layers: the parameter num_gpu in the option modelfile",
        "OLLAMA_GPU_LAYERS": "how many layers: the parameter num_gpu in the option modelfile",
        "OLLAMA_NUM_CTX": "use the option context_length",
        "OLLAMA_NUM_THREAD": "use the parameter num_thread in the option modelfile",
        "OLLAMA_LLM_BACKEND": "no release of Ollama has it; for vLLM, make a vllm deployment",
        "OLLAMA_VLLM_HOST": "no release of Ollama has it; for vLLM, make a vllm deployment",
        "OLLAMA_API_KEY": "a server checks no keys: put a balancer in front and give it the keys",
        "OLLAMA_PORT": "the deployment's port says it",
        "OLLAMA_MULTIUSER_CACHE": "it is gone; leave it out",
        "OLLAMA_NEW_ENGINE": "it is gone; leave it out",
        "OLLAMA_INTEL_GPU": "it is gone; Vulkan serves Intel GPUs (OLLAMA_VULKAN)",
    },
}

# What the engine would take, but what the role says already, or what must not be said so.
OWNED: dict[str, dict[str, str]] = {
    "vllm": {
        "--model": "the model comes from the deployment's `model`",
        "--host": "the role says where it listens: what asks it decides that",
        "--port": "use the deployment's port",
        "--served-model-name": "use the model's served_name",
        "--revision": "use the model's revision",
        "--api-key": "a command line shows it to all who can list processes: use api_key",
        "--hf-token": "a command line shows it to all who can list processes: use hf_token",
        "--config": "a second place for flags hides them from this check: use options",
        "-tp": "use the option tensor_parallel",
        "--tensor-parallel-size": "use the option tensor_parallel",
        "-pp": "use the option pipeline_parallel",
        "--pipeline-parallel-size": "use the option pipeline_parallel",
        "--shutdown-timeout": "use the option shutdown_timeout: the unit waits accordingly",
    },
    "tgi": {
        "--model-id": "the model comes from the deployment's `model`",
        "--hostname": "the role says where it listens: what asks it decides that",
        "--port": "use the deployment's port",
        "-p": "use the deployment's port",
        "--revision": "use the model's revision",
        "--api-key": "a command line shows it to all who can list processes: use api_key",
        "--num-shard": "gpus_per_instance says it",
        "--sharded": "gpus_per_instance says it",
        "--graceful-termination-timeout": "use the option shutdown_timeout",
    },
    "ollama": {},
}

OWNED_VARIABLES: dict[str, dict[str, str]] = {
    "vllm": {
        "VLLM_PORT": "it is the base of vLLM's internal ports, not of its API's: use port",
        "VLLM_API_KEY": "this file can be read by all: use api_key, which takes a reference",
        "HF_TOKEN": "this file can be read by all: use hf_token, which takes a reference",
        "HUGGING_FACE_HUB_TOKEN": "use hf_token, which takes a reference",
        "HF_HUB_ENABLE_HF_TRANSFER": "it does nothing any more: HF_XET_HIGH_PERFORMANCE does",
        "CUDA_VISIBLE_DEVICES": "the deployment's gpus say it",
        "NVIDIA_VISIBLE_DEVICES": "the deployment's gpus say it",
    },
    "tgi": {
        "API_KEY": "this file can be read by all: use api_key, which takes a reference",
        "HF_TOKEN": "this file can be read by all: use hf_token, which takes a reference",
        "HUGGING_FACE_HUB_TOKEN": "use hf_token, which takes a reference",
        "MODEL_ID": "the model comes from the deployment's `model`",
        "PORT": "use the deployment's port",
        "HOSTNAME": "the role says where it listens: what asks it decides that",
        "NUM_SHARD": "gpus_per_instance says it",
        "CUDA_VISIBLE_DEVICES": "the deployment's gpus say it",
        "NVIDIA_VISIBLE_DEVICES": "the deployment's gpus say it",
    },
    "ollama": {
        "OLLAMA_HOST": "the role says where it listens; the deployment's port says where",
        "OLLAMA_MODELS": "the role keeps models where its unit may write",
        "OLLAMA_CONTEXT_LENGTH": "use the option context_length",
        "OLLAMA_FLASH_ATTENTION": "use the option flash_attention",
        "OLLAMA_KEEP_ALIVE": "use the option keep_alive",
        "OLLAMA_KV_CACHE_TYPE": "use the option kv_cache_type",
        "OLLAMA_NUM_PARALLEL": "use the option num_parallel",
        "OLLAMA_NO_CLOUD": "use the option cloud",
        "OLLAMA_MAX_LOADED_MODELS": "use the option max_loaded_models",
        "OLLAMA_MAX_QUEUE": "use the option max_queue",
        "OLLAMA_SCHED_SPREAD": "use the option spread",
        "CUDA_VISIBLE_DEVICES": "the deployment's gpus say it",
    },
}
