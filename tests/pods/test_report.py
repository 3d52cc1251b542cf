"""Plans as words, and a page made from JSON files."""

import json

import pytest

from focus_jax.pods.report import MARK, line, lines, table, write_page

GIB = 2**30
PLAN = {
    "config": "seven", "method": "full", "what": "train", "stage": "instruct",
    "topology": "v5e:16x16", "devices": 256, "mesh": {"data": 1, "fsdp": 64, "tensor": 4},
    "batch": 128, "accumulate": 2, "remat": "dots", "tiles": 5,
    "text": 1024, "compiled": True, "fits": True, "refused": "", "notes": ["loop %a"],
    "memory": {
        "argument": GIB, "output": GIB, "aliased": GIB, "temporary": 3 * GIB, "code": 0,
        "total": 4 * GIB, "hbm": 16 * GIB,
    },
    "flops": {
        "products": 80e12, "attention": 10e12, "compiled": 90e12, "model": 81e12, "ratio": 0.9,
        "convention": "as told",
    },
    "hbm_bytes": 4e11, "payload": 30e9, "wire": 25e9,
    "collectives": [
        {
            "kind": "all-gather", "axes": ["fsdp"], "payload": 30e9, "wire": 25e9, "runs": 64,
            "all_links": 0.125, "own_links": 0.25,
        }
    ],
    "seconds": {
        "compute": 0.45, "memory": 0.4, "network_all_links": 0.125, "network_own_links": 0.25,
        "least": 0.45,
    },
    "bound": "compute", "mfu_ceiling": 0.9, "tokens_per_second": 1e6, "images_per_second": 284.4,
    "command": "python -m focus_jax plan --topology v5e:16x16",
}  # fmt: skip


def test_one_plan_as_a_table():
    said = table(PLAN)
    assert "| full, train instruct | v5e:16x16 |" in said
    assert "| mesh | fsdp=64,tensor=4: 256 devices |" in said
    assert "| batch | 2 x 64 images of 5 tiles, text 1024 |" in said
    assert "| fits | yes, 25% of 16.00 GiB |" in said
    assert "| all-gather along fsdp | 30.00 GB payload, 25.00 GB wire, 64 runs" in said
    assert "90.00 T = 80.00 T products + 10.00 T attention kernels" in said
    assert "81.00 T, 0.900 of that" in said and "| note | loop %a |" in said
    refused = table({**PLAN, "fits": False, "refused": "out of memory"})
    assert "| fits | NO" in refused and "| refused | out of memory |" in refused


def test_one_plan_as_a_line():
    cells = [cell.strip() for cell in line(PLAN).strip("|").split("|")]
    assert cells[0] == "seven, v5e:16x16 fsdp=64,tensor=4, full instruct"
    assert cells[2:5] == ["1.0 + 3.0", "25%", "yes"]
    assert cells[5:7] == ["81.0 / 90.0", "0.90"] and cells[11] == "125 / 250"
    head = lines([PLAN]).splitlines()[0]
    assert len(cells) == len(head.strip("|").split("|"))
    assert "(analysis)" in line({**PLAN, "compiled": False})


def test_a_page_is_made_from_files(tmp_path):
    page, folder = tmp_path / "pods.md", tmp_path / "plans"
    folder.mkdir()
    page.write_text(f"# Pods\nwords\n{MARK}\nold plans\n")
    with pytest.raises(ValueError, match="holds no plans"):
        write_page(page, folder)
    (folder / "b.json").write_text(json.dumps([PLAN, {**PLAN, "method": "focusllava"}]))
    (folder / "a.json").write_text(json.dumps({**PLAN, "command": "other"}))
    assert write_page(page, folder) == 3
    said = page.read_text()
    assert said.startswith(f"# Pods\nwords\n{MARK}\n") and "old plans" not in said
    assert said.index("### a") < said.index("other") < said.index("### b")
    assert said.count(PLAN["command"]) == 1 and said.count("| seven, v5e:16x16") == 3
    assert write_page(page, folder) == 3 and page.read_text() == said


def test_a_page_without_a_place_for_plans(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PLAN))
    page = tmp_path / "pods.md"
    page.write_text("# Pods\n")
    with pytest.raises(ValueError, match="has no line"):
        write_page(page, tmp_path)
    assert page.read_text() == "# Pods\n"
