"""The torch.library namespace `nvfp4::` in which every op is registered, so that torch.compile and export see whole ops."""

import torch

LIBRARY = torch.library.Library("nvfp4", "DEF")


def register(schema: str, run, fake) -> None:
    """Define `nvfp4::<schema>` with its eager implementation (all devices) and its fake (shapes alone).

    Lower overhead than torch.library.custom_op, which matters to small layers; the ops take tensors, numbers and strings.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nvfp4::{name}", fake, lib=LIBRARY)
