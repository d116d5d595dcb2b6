"""What a search chose for the published Nemotron 3 Super NVFP4 checkpoint, layer by layer: data that no rule gives.

From its hf_quant_config.json: 40,961 linear layers NVFP4 (all routed experts, one shared down_proj), 139 FP8.
"""

SUPER_PATTERN = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
SUPER_NVFP4_SHARED_DOWN = (1,)
_EXPERTS = tuple(i for i, letter in enumerate(SUPER_PATTERN) if letter == "E")
SUPER_FP8 = {
    "in_proj": (
        0, 2, 4, 6, 9, 11, 13, 15, 18, 20, 27, 29, 31, 40, 49, 51, 53, 55, 57, 60, 62, 66, 68, 71, 73, 82, 84, 86,
    ),
    "out_proj": (
        0, 2, 4, 9, 11, 13, 18, 38, 40, 42, 44, 49, 51, 53, 55, 57, 60, 62, 64, 66, 68, 71, 73, 75, 77, 80, 82, 84, 86,
    ),
    "shared_experts.up_proj": tuple(i for i in _EXPERTS if i != 41),
    "shared_experts.down_proj": tuple(i for i in _EXPERTS if i not in (1, 8, 76)),
    "fc1_latent_proj": (1, 3, 5),
    "fc2_latent_proj": (3,),
    "o_proj": (69, 78),
}  # fmt: skip
