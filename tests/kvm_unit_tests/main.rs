//! The images of kvm-unit-tests on the software platform, as normal VMs.
//!
//! The images are GPL software and lie outside of this repository. `KVM_OPS_UNIT_TESTS` names a list of
//! them (its format: `list.rs`); without it the test says that it is skipped. The results must be those of
//! the table in docs/kvm-unit-tests.md, subtests included. `BLESS=1` writes what differs into the
//! table. `KVM_OPS_UNIT_TESTS_ONLY`, words separated by commas, runs only those, and prints the consoles
//! of those that do not pass.
#![cfg(all(feature = "sim", feature = "intel", feature = "amd"))]

mod devices;
mod list;
mod model;
mod multiboot;
mod run;
#[path = "../../machine/src/samples.rs"]
#[allow(dead_code)] // The ELF file alone is made here.
mod samples;
mod table;

use std::path::Path;
use std::time::Duration;

use list::Entry;
use run::{Outcome, Verdict, run_file};
use table::Page;

fn entries() -> Option<Vec<Entry>> {
    let Some(path) = std::env::var_os("KVM_OPS_UNIT_TESTS") else {
        println!("skipped: KVM_OPS_UNIT_TESTS names no list of images");
        return None;
    };
    let path = Path::new(&path);
    let text = std::fs::read_to_string(path).expect("the list can be read");
    let base = path.parent().unwrap_or(Path::new(""));
    Some(list::parse(&text, base).expect("a list"))
}

fn millions(outcome: &Outcome) -> String {
    let millions = outcome.instructions as f64 / 1e6;
    let rate = millions / outcome.seconds;
    format!("{millions:.1} M in {:.1} s, {rate:.0} M/s", outcome.seconds)
}

#[test]
fn the_images_end_as_the_page_says() {
    let Some(entries) = entries() else { return };
    let only = std::env::var("KVM_OPS_UNIT_TESTS_ONLY").ok();
    let wanted = |entry: &&Entry| match &only {
        Some(words) => words.split(',').any(|word| word == entry.name),
        None => true,
    };
    let mut page = Page::open();
    let mut different = Vec::new();
    let (mut passed, mut runs) = (0, 0);
    for entry in entries.iter().filter(wanted) {
        let outcome = run::run(entry).unwrap_or_else(|error| panic!("{}: {error}", entry.name));
        println!("{}: {outcome} ({})", entry.name, millions(&outcome));
        if outcome.verdict != Verdict::Pass {
            println!("  {}", outcome.end);
        }
        if only.is_some() && (outcome.verdict != Verdict::Pass || outcome.failed != 0) {
            println!("{}", outcome.console);
        }
        runs += 1;
        passed += usize::from(outcome.verdict == Verdict::Pass);
        different.extend(page.record(&entry.name, &outcome.to_string()));
    }
    println!("{passed} of {runs} runs pass");
    page.close(&different);
}

/// 32-bit code that prints a text on the serial line and writes a value to the exit port.
fn image(text: &str, value: u8) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, BYTE; out dx, al
    }
    // movzx eax, VALUE; out 0xf4, eax; hlt
    code.extend([0xb8, value, 0, 0, 0, 0xe7, 0xf4, 0xf4]);
    let at = 4 << 20;
    samples::elf(false, at, at, &code, code.len() as u64)
}

fn outcome(file: &[u8]) -> Outcome {
    let entry = Entry {
        name: "sample".into(),
        image: "".into(),
        vcpus: 1,
        memory: 16 << 20,
        cpu: "max".into(),
        append: String::new(),
        timeout: Duration::from_secs(20),
        environment: String::new(),
    };
    run_file(&entry, file).expect("a run")
}

#[test]
fn verdict_and_subtests_are_told_from_the_exit_port_and_the_console() {
    let text = "PASS: a\nFAIL: b\nSKIP: c\nPASS: d\nnothing\n";
    for (value, expected) in [
        (0, "pass 2P/1F/1S"),
        (1, "**fail** 2P/1F/1S"),
        (38, "skip 2P/1F/1S"),
        (63, "**abort** 2P/1F/1S"),
    ] {
        assert_eq!(outcome(&image(text, value)).to_string(), expected);
    }
    // An undefined instruction without an interrupt table.
    let at = 4 << 20;
    let wild = samples::elf(false, at, at, &[0x0f, 0x0b], 2);
    assert_eq!(outcome(&wild).verdict, Verdict::TripleFault);
}

#[test]
fn an_image_finds_command_line_fw_cfg_and_the_register_of_the_test_device() {
    let code = [
        // mov eax, [ebx + 16] (the command line); add eax, [eax] ("samp"); sub eax, "samp"; push eax
        &[0x8b, 0x43, 0x10, 0x89, 0xc1, 0x03, 0x00, 0x29, 0xc8, 0x2d][..],
        b"samp",
        &[0x89, 0xc6], // mov esi, eax: 0 if it is there
        // mov eax, 5; mov dx, 0x510; out dx, ax; inc edx; in al, dx; dec al: processors less 1
        &[
            0xb8, 5, 0, 0, 0, 0x66, 0xba, 0x10, 0x05, 0x66, 0xef, 0x42, 0xec, 0xfe, 0xc8,
        ],
        &[0x0f, 0xb6, 0xc0, 0x09, 0xc6], // movzx eax, al; or esi, eax
        // mov eax, 0x12345678; out 0xe0, eax; in eax, 0xe0; sub eax, 0x12345678; or esi, eax
        &[
            0xb8, 0x78, 0x56, 0x34, 0x12, 0xe7, 0xe0, 0xe5, 0xe0, 0x2d, 0x78, 0x56, 0x34, 0x12,
        ],
        &[0x09, 0xc6],
        // mov edi, 0xff000004; mov [edi], edi; mov eax, [edi]; sub eax, edi; or esi, eax
        &[
            0xbf, 4, 0, 0, 0xff, 0x89, 0x3f, 0x8b, 0x07, 0x29, 0xf8, 0x09, 0xc6,
        ],
        // setnz al; movzx eax, al; out 0xf4, eax
        &[0x0f, 0x95, 0xc0, 0x0f, 0xb6, 0xc0, 0xe7, 0xf4],
    ]
    .concat();
    let at = 4 << 20;
    let file = samples::elf(false, at, at, &code, code.len() as u64);
    let outcome = outcome(&file);
    assert_eq!(outcome.verdict, Verdict::Pass, "{}", outcome.end);
}
