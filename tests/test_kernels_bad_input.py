"""Wrong input of the kernels is refused in words."""

import pytest
import torch
from kernel_cases import catalogue, inputs, titles_of

from delrec.kernels import verbalizer as kernels

pytest_plugins = ["kernel_fixtures"]


def bad_scores(**change):
    x, head, tok, n, b = inputs()
    return dict(dict(x_BD=x, head_VD=head, tok_BCT=tok, n_BC=n, bias_V=b), **change)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(x_BD=torch.zeros(13)), r"x_BD has shape \(13,\), expected 2"),
        (dict(x_BD=torch.zeros(3, 12)), r"x and head_VD have shapes \(3, 12\), \(23, 13\)"),
        (
            dict(x_BD=torch.zeros(4, 13)),
            r"tok_BCT, n_BC and x_BD have shapes \(3, 7, 5\), \(3, 7\), \(4, 13\)",
        ),
        (
            dict(x_BD=torch.zeros(3, 13).bfloat16()),
            r"x of shape \(3, 13\) is torch.bfloat16, head_VD of shape \(23, 13\) is torch.float32",
        ),
        (
            dict(x_BD=torch.zeros(3, 13).long(), head_VD=torch.zeros(23, 13).long()),
            "expected floating point",
        ),
        (dict(tok_BCT=torch.zeros(3, 7)), "tok_BCT has shape"),
        (dict(tok_BCT=torch.zeros(3, 7, 5)), "tok_BCT is torch.float32, expected integers"),
        (
            dict(tok_BCT=torch.full((3, 7, 5), 23)),
            r"tok_BCT of shape \(3, 7, 5\) holds 23, expected 0..22",
        ),
        (
            dict(tok_BCT=torch.full((3, 7, 5), 23).int(), n_BC=torch.ones(3, 7).int()),
            "holds 23, expected 0..22",
        ),
        (dict(tok_BCT=torch.full((3, 7, 5), 2**40)), "holds 1099511627776"),
        (dict(tok_BCT=torch.full((3, 7, 5), -1)), "holds -1"),
        (
            dict(n_BC=torch.full((3, 7), 6)),
            r"n_BC of shape \(3, 7\) holds 6, expected 0..5: lengths are 0..T, tok_BCT has shape "
            r"\(3, 7, 5\)",
        ),
        (dict(n_BC=torch.full((3, 6), 1)), "C in the first two"),
        (dict(bias_V=torch.zeros(22)), r"bias_V and head_VD have shapes \(22,\), \(23, 13\)"),
        (
            dict(head_VD=torch.zeros(13, 23).t()),
            r"head_VD of shape \(23, 13\) has strides \(1, 23\), x has shape \(3, 13\)",
        ),
        (dict(head_VD=torch.zeros(1, 13).expand(23, 13)), r"strides \(0, 1\)"),
    ],
)
def test_candidate_scores_refuses_in_words(ops, change, says):
    args = bad_scores(**change)
    with pytest.raises(ValueError, match=says):
        ops.candidate_scores(
            args["x_BD"], args["head_VD"], args["tok_BCT"], args["n_BC"], args["bias_V"]
        )


@pytest.mark.parametrize(
    "change, says",
    [
        (
            dict(tok=torch.zeros(10, dtype=torch.long)),
            r"tok_N and x_ND have shapes \(10,\), \(11, 13\)",
        ),
        (dict(tok=torch.full((11,), 99)), "holds 99, expected 0..22"),
        (dict(ptr=torch.tensor([0, 5, 3, 11])), "ptr_T1 of shape"),
        (dict(ptr=torch.tensor([0, 5, 12])), "0..11, the length of tok_N"),
        (dict(ptr=torch.tensor([0, 5])), "runs from 0 to 5, expected 0 to the 11 rows"),
        (dict(ptr=torch.zeros(0, dtype=torch.long)), "one more entry than titles"),
    ],
)
def test_title_likelihood_refuses_in_words(ops, change, says):
    x, head, tok, ptr, b = titles_of()
    args = dict(tok=tok, ptr=ptr) | change
    with pytest.raises(ValueError, match=says):
        ops.title_likelihood(x, head, args["tok"], args["ptr"], b)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(k=0), "k is 0"),
        (dict(tok=torch.full((12,), 23)), "holds 23"),
        (dict(ptr=torch.tensor([0, 13])), "0..12, the length of tok_M"),
        (dict(seen=torch.zeros(2, 4).long()), r"seen_BS and x_BD have shapes \(2, 4\), \(3, 13\)"),
        (dict(seen=torch.zeros(3, 4)), "seen_BS is torch.float32"),
    ],
)
def test_catalogue_refuses_in_words(ops, change, says):
    x, head, ptr, tok, b = catalogue()
    args = dict(ptr=ptr, tok=tok, k=3, seen=None) | change
    with pytest.raises(ValueError, match=says):
        ops.catalogue_topk(x, head, args["ptr"], args["tok"], args["k"], args["seen"], b)


def test_an_implementation_that_cannot_is_refused():
    x, head, tok, n, _ = inputs()
    with pytest.raises(ValueError, match="expected 'auto', 'ref', 'cpp' or 'triton'"):
        kernels.candidate_scores(x, head, tok, n, impl="cuda")
    with pytest.raises(ValueError, match="takes fp32, bf16 and fp16, x is torch.float64"):
        kernels.candidate_scores(x.double(), head.double(), tok, n, impl="triton")
    # auto: the reference
    assert kernels.candidate_scores(x.double(), head.double(), tok, n).dtype == torch.float64
