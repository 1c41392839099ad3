//! Tests `run` with images on a processor and with TDs.

mod common;
#[allow(dead_code)] // Some of its images are for machine/.
#[path = "../../machine/src/samples.rs"]
mod samples;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{check, hosts, ovmf, program, run};

const SEABIOS: &str = "/usr/share/seabios/bios.bin";

fn has_seabios() -> bool {
    let there = Path::new(SEABIOS).is_file();
    if !there {
        println!("skipped: {SEABIOS} is not installed");
    }
    there
}

/// Creates a flat image of these bytes.
fn flat(code: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), code).unwrap();
    file
}

#[test]
fn seabios_prints_its_banner_and_the_timeout_is_no_failure() {
    if !has_seabios() {
        return;
    }
    for host in hosts() {
        let start = Instant::now();
        let ran = run(&["run", SEABIOS, "--timeout", "2s", "--host", host]);
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        assert!(ran.out.contains("SeaBIOS (version"), "{}", ran.out);
        assert!(ran.err.contains("stopped at the deadline"), "{}", ran.err);
        assert!(ran.err.contains("io-out"), "{}", ran.err);
        let counted = ran.err.contains(" instructions, ");
        assert_eq!(counted, host == "sim", "{}", ran.err);
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}

#[test]
fn each_end_has_its_exit_code() {
    for host in hosts() {
        // mov dx, 0x402; mov al, 'x'; out dx, al; hlt
        let prints = b"\xba\x02\x04\xb0x\xee\xf4".to_vec();
        // mov al, N; out 0xf4, al; hlt
        let exits = |value| vec![0xb0, value, 0xe6, 0xf4, 0xf4];
        // mov al, 0xfe; out 0x64, al; hlt: the keyboard controller pulls the reset line
        let resets = b"\xb0\xfe\xe6\x64\xf4".to_vec();
        // jmp $
        let spins = vec![0xeb, 0xfe];
        for (code, exit_code, end) in [
            (prints, 0, "halted"),
            (exits(0), 0, "debug exit 0x0"),
            (exits(7), 3, "debug exit 0x7"),
            (resets, 0, "asked for a reset"),
            (spins, 0, "deadline"),
        ] {
            let image = flat(&code);
            let path = image.path().to_str().unwrap();
            let ran = run(&[
                "run",
                path,
                "--format",
                "flat",
                "--memory",
                "1M",
                "--timeout",
                "500ms",
                "--host",
                host,
            ]);
            assert!(ran.err.contains(end), "{end}: {}", ran.err);
            assert_eq!(ran.code, Some(exit_code), "{end}: {}", ran.err);
            if end == "halted" {
                assert_eq!(ran.out, "x\n");
            }
        }
    }
}

#[test]
fn a_guest_starts_its_second_vcpu_where_it_has_an_irqchip() {
    for host in hosts() {
        let image = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/pair.bin");
        let args = [
            "run", image, "--format", "flat", "--vcpus", "2", "--memory", "1M",
        ];
        let ran = run(&[&args[..], &["--irqchip", "full", "--host", host]].concat());
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        assert_eq!(ran.out, "two vCPUs took 16 turns each\n");
        assert!(ran.err.contains("vCPU 1: ended with vCPU 0"), "{}", ran.err);
    }
}

#[test]
fn a_full_disk_behind_standard_output_ends_the_guest_and_is_told() {
    let Ok(full) = std::fs::File::options().write(true).open("/dev/full") else {
        println!("skipped: there is no /dev/full");
        return;
    };
    // mov dx, 0x402; mov al, 'x'; out dx, al; jmp $
    let image = flat(b"\xba\x02\x04\xb0x\xee\xeb\xfe");
    let args = [
        "run",
        image.path().to_str().unwrap(),
        "--format",
        "flat",
        "--timeout",
        "10m",
    ];
    let output = program().args(args).stdout(full).output().unwrap();
    let ran = check(&args, output);
    assert_eq!(ran.code, Some(6), "{}", ran.err);
    assert!(
        ran.err.contains("cannot write to standard output"),
        "{}",
        ran.err
    );
}

#[test]
fn the_software_platform_runs_an_image_the_same_each_time_and_counts_its_instructions() {
    // mov dx, 0x402; mov al, 'x'; out dx, al; hlt
    let image = flat(b"\xba\x02\x04\xb0x\xee\xf4");
    let path = image.path().to_str().unwrap();
    for _ in 0..2 {
        let ran = run(&["run", path, "--format", "flat", "--host", "sim"]);
        assert_eq!(
            (ran.code, ran.out.as_str()),
            (Some(0), "x\n"),
            "{}",
            ran.err
        );
        assert!(ran.err.contains(" on sim ("), "{}", ran.err);
        assert!(ran.err.contains("\n4 instructions, "), "{}", ran.err);
    }
}

#[test]
fn a_sev_guest_starts_with_firmware_and_other_images_are_refused_with_the_reason() {
    let code = flat(&[0xf4]);
    // The smallest ROM that is recognised: the jump of a reset vector, and no tables.
    let mut rom = vec![0; 0x1_0000];
    rom[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0xf0]);
    let rom = flat(&rom);
    for tech in ["sev", "sev-es", "sev-snp"] {
        let refused = |args: &[&str], code, why: &str| {
            let ran = run(&[&["run", "--host", "sim", "--tech", tech], args].concat());
            assert_eq!(ran.code, Some(code), "{tech}: {}", ran.err);
            assert!(ran.err.contains(why), "{tech}: {}", ran.err);
        };
        let path = code.path().to_str().unwrap();
        refused(&[path], 5, "hint: ");
        refused(&[path, "--format", "flat"], 2, "--format has no meaning");
        refused(&[path, "--append", "quiet"], 2, "--cmdline has no meaning");
        refused(&[path, "--order", "single"], 2, "--order has no meaning");
        refused(&[], 2, "needs an image");
        if tech == "sev-snp" {
            refused(
                &[rom.path().to_str().unwrap()],
                5,
                "the image has no table of GUIDed entries",
            );
        }
    }
}

#[test]
fn what_cannot_be_read_is_refused_with_a_reason_and_exit_code_5() {
    let directory = tempfile::tempdir().unwrap();
    let empty = flat(&[]);
    for (path, why) in [
        ("/nonexistent/image", "cannot read /nonexistent/image"),
        (directory.path().to_str().unwrap(), "not a regular file"),
        (empty.path().to_str().unwrap(), "is empty"),
    ] {
        let ran = run(&["run", path]);
        assert_eq!(ran.code, Some(5), "{path}");
        assert!(ran.err.starts_with("error: "), "{}", ran.err);
        assert!(ran.err.contains(why), "{why}: {}", ran.err);
    }
}

#[test]
fn an_image_larger_than_the_memory_is_refused_with_both_sizes() {
    for host in hosts() {
        let image = flat(&vec![0xf4; 0x3000]);
        let path = image.path().to_str().unwrap();
        let ran = run(&[
            "run", path, "--format", "flat", "--memory", "40K", "--host", host,
        ]);
        assert_eq!(ran.code, Some(2), "{}", ran.err);
        assert!(ran.err.contains("0x3000"), "{}", ran.err);
        assert!(ran.err.contains("hint: "), "{}", ran.err);
    }
}

#[test]
fn bad_options_are_refused_with_exit_code_2() {
    for (option, value, why) in [
        ("--vcpus", "0", "0 is not in 1..="),
        ("--memory", "0", "a VM needs memory"),
        ("--memory", "5000", "not a multiple of the page size"),
        ("--memory", "lots", "is not a size"),
        ("--memory", "5T", "more than 1T"),
        ("--timeout", "10", "is not a time"),
        ("--timeout", "0s", "zero"),
        ("--tech", "tdc", "tdx"),
        ("--format", "elff", "elf"),
        ("--host", "xen", "kvm"),
    ] {
        let ran = run(&["run", "image", option, value]);
        assert_eq!(ran.code, Some(2), "{option} {value}");
        assert!(ran.err.contains(why), "{why}: {}", ran.err);
    }
}

#[test]
fn a_technology_that_cannot_be_had_is_refused_with_the_reason() {
    let image = flat(&[0xf4]);
    let path = image.path().to_str().unwrap();
    for tech in ["tdx", "sev", "sev-es", "sev-snp"] {
        // Because of its image, before a host is tried.
        let ran = run(&["run", path, "--tech", tech]);
        assert_eq!(ran.code, Some(5), "{tech}: {}", ran.err);
        assert!(
            ran.err.contains("error: ") && ran.err.contains("hint: "),
            "{}",
            ran.err
        );
    }
}

/// Returns a step's SEAMCALLs and its details from the table.
fn step<'a>(text: &'a str, name: &str) -> (u64, &'a str) {
    let line = text.lines().find(|line| line.starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no step {name}: {text}"));
    let (calls, detail) = line[name.len()..].trim_start().split_once(' ').expect(name);
    (calls.parse().expect(name), detail.trim())
}

/// Checks the output of a TD's run, for any start. Returns the MRTD.
fn ran_as_td(args: &[&str]) -> String {
    let ran = run(&[&["run", "--tech", "tdx"], args].concat());
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    for line in [
        "pages are as they were launched",
        "private memory keeps what is written",
        "are shared with the host",
        "taken back, they are private and zero",
        "the module's report has the MRTD of the image",
    ] {
        assert!(ran.out.contains(line), "no `{line}`: {}", ran.out);
    }
    assert!(ran.err.contains("halted after"), "{}", ran.err);
    assert!(ran.err.contains("map-gpa-range 2"), "{}", ran.err);
    let (compare, mrtd) = step(&ran.err, "compare MRTD");
    let (finish, _) = step(&ran.err, "create, measure, finalise");
    let (enter, seen) = step(&ran.err, "run");
    let (tear_down, freed) = step(&ran.err, "tear down");
    assert_eq!((compare, seen), (6, "the host saw what the guest shared"));
    assert!(freed.ends_with("1 KeyID freed"), "{freed}");
    // The steps' SEAMCALLs add up to the module's own counts by leaf.
    let total = format!("{} SEAMCALLs:", finish + compare + enter + tear_down);
    assert!(
        ran.err.lines().any(|line| line == total),
        "{total} {}",
        ran.err
    );
    let leaf = |name: &str| -> u64 {
        let words: Vec<_> = ran.err.split_whitespace().collect();
        let at = words.iter().position(|word| *word == name).expect(name);
        words[at + 1].trim_end_matches(',').parse().expect(name)
    };
    let leaves: u64 = ran
        .err
        .split_whitespace()
        .filter(|word| word.starts_with("TDH."))
        .map(leaf)
        .sum();
    assert_eq!(leaves, finish + compare + enter + tear_down, "{}", ran.err);
    // 16 pages are shared; the guest had used only the first and the last.
    assert_eq!(leaf("TDH.MEM.PAGE.REMOVE"), 2, "{}", ran.err);
    let (taken, back) = ran
        .err
        .split_once(" pages taken = ")
        .and_then(|(before, after)| {
            let taken = before.split_whitespace().next_back()?;
            Some((taken.to_owned(), after.split_once(" freed + 0 leaked")?.0))
        })
        .unwrap_or_else(|| panic!("no account: {}", ran.err));
    assert_eq!(taken, back, "{}", ran.err);
    assert!(!ran.err.contains("does not add up"), "{}", ran.err);
    mrtd.strip_suffix(", as off line")
        .expect("it is compared")
        .to_owned()
}

#[test]
fn a_small_td_is_built_measured_run_and_given_back() {
    ran_as_td(&[]);
    ran_as_td(&["--vcpus", "4", "--memory", "2M"]);
}

#[test]
fn a_td_of_real_firmware_has_the_mrtd_that_measure_prints() {
    let Some(ovmf) = ovmf() else { return };
    let measured = run(&["measure", "tdx", &ovmf]);
    if measured.code != Some(0) {
        return;
    }
    assert_eq!(executed_in_a_td(&[&ovmf]), measured.out.trim_end());
    let two_pass = run(&["measure", "tdx", &ovmf, "--order", "two-pass"]);
    assert_ne!(two_pass.out, measured.out);
    assert_eq!(
        executed_in_a_td(&[&ovmf, "--order", "two-pass"]),
        two_pass.out.trim_end()
    );
}

/// Executes firmware in a TD for a while. Returns the MRTD.
fn executed_in_a_td(args: &[&str]) -> String {
    let td = [
        "run",
        "--tech",
        "tdx",
        "--memory",
        "64M",
        "--timeout",
        "500ms",
        "--allow-rbp",
    ];
    let ran = run(&[&td[..], args].concat());
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    assert!(ran.err.contains("stopped at the deadline"), "{}", ran.err);
    assert!(ran.err.contains(" instructions, "), "{}", ran.err);
    for register in ["RTMR0", "RTMR1", "RTMR2", "RTMR3"] {
        assert_eq!(step(&ran.err, register).1.len(), 96, "{}", ran.err);
    }
    let (_, mrtd) = step(&ran.err, "compare MRTD");
    mrtd.strip_suffix(", as off line")
        .expect("it is compared")
        .to_owned()
}

/// MRTD of Debian 12's OVMF.fd, added page by page.
const DEBIAN_12: &str = "4c7206f0f483c524f12c366c711e9049030a8d47c471ee5aa9c4999a08de4057fb887fed0744d5631a212967fb231c47";

#[test]
fn firmware_that_passes_rbp_fails_in_a_td_that_does_not_allow_it() {
    let Some(ovmf) = ovmf() else { return };
    if run(&["measure", "tdx", &ovmf]).out.trim_end() != DEBIAN_12 {
        println!("skipped: {ovmf} is not Debian 12's");
        return;
    }
    let td = ["run", "--tech", "tdx", "--memory", "64M", "--timeout", "5m"];
    let ran = run(&[&td[..], &[&ovmf]].concat());
    assert_eq!(ran.code, Some(3), "{}{}", ran.out, ran.err);
    let refused = "TDG.VP.VMCALL OPERAND_INVALID";
    assert!(ran.err.contains(refused), "{}", ran.err);
}

#[test]
fn a_td_that_cannot_be_launched_is_refused_with_the_reason() {
    let plain = flat(&[0xf4; 4096]);
    let plain = plain.path().to_str().unwrap();
    for (args, code, words) in [
        (&[plain][..], 5, "cannot be launched as a TD"),
        (&["/nowhere.fd"], 5, "cannot read /nowhere.fd"),
        (&["--memory", "64K"], 2, "no memory for the guest"),
        (
            &["--cmdline", "quiet"],
            2,
            "--cmdline has no meaning for a TD",
        ),
        (
            &["--kernel", plain],
            2,
            "--kernel has no meaning for the built-in guest",
        ),
        (
            &["--allow-rbp"],
            2,
            "--allow-rbp has no meaning for the built-in guest",
        ),
        (
            &["--collateral", "collateral.json"],
            2,
            "--collateral has no meaning for the built-in guest",
        ),
        (
            &["--host", "kvm"],
            6,
            "no host can run the built-in guest as a tdx VM",
        ),
        (
            &["--irqchip", "full"],
            6,
            "an irqchip wholly in the platform",
        ),
    ] {
        let ran = run(&[&["run", "--tech", "tdx"], args].concat());
        assert_eq!(ran.code, Some(code), "{args:?}: {}", ran.err);
        assert!(ran.err.contains(words), "{args:?}: {}", ran.err);
    }
}

/// Runs flat code, and returns what was told of it.
fn told(code: &[u8], more: &[&str]) -> (Option<i32>, String) {
    let image = flat(code);
    let path = image.path().to_str().unwrap();
    let ran = run(&[&["run", path, "--format", "flat", "--memory", "1M"], more].concat());
    (ran.code, ran.err)
}

#[test]
fn a_guest_that_dies_is_a_failure_and_told_with_its_place_and_instruction() {
    for host in hosts() {
        for (code, end, line) in [
            (
                &[0x90, 0x0f, 0x0b][..],
                "exception 6 (#UD, invalid opcode)",
                "vCPU 0 at 0000:7c01 (real mode, 16-bit): 0f 0b  ud2",
            ),
            (
                &[0xcc, 0xf4],
                "exception 3 (#BP, breakpoint)",
                "vCPU 0 at 0000:7c01 (real mode, 16-bit): f4  hlt",
            ),
            (
                &[0xcd, 0x13, 0xf4],
                "interrupt 0x13 without a handler",
                "vCPU 0 at 0000:7c02 (real mode, 16-bit): f4  hlt",
            ),
        ] {
            let (exit_code, err) = told(code, &["--host", host]);
            assert_eq!(exit_code, Some(3), "{err}");
            assert!(err.contains(end) && err.contains(line), "{err}");
        }
    }
}

#[test]
fn a_guest_at_its_deadline_is_told_with_its_place_and_instruction() {
    for host in hosts() {
        let (code, err) = told(&[0xeb, 0xfe], &["--timeout", "200ms", "--host", host]);
        assert_eq!(code, Some(0), "{err}");
        let line = "vCPU 0 at 0000:7c00 (real mode, 16-bit): eb fe  jmp short 7C00h";
        assert!(err.contains(line), "{err}");
        // One that halts stands nowhere of interest.
        let (_, err) = told(&[0xf4], &["--host", host]);
        assert!(!err.contains("vCPU 0 at"), "{err}");
    }
}

#[test]
fn the_json_report_has_the_place_the_console_and_what_the_image_was_taken_for() {
    for host in hosts() {
        // mov dx, 0x402; mov al, 'x'; out dx, al; ud2
        let image = flat(b"\xba\x02\x04\xb0x\xee\x0f\x0b");
        let path = image.path().to_str().unwrap();
        let args = ["run", path, "--format", "flat", "--memory", "1M", "--json"];
        let ran = run(&[&args[..], &["--host", host]].concat());
        assert_eq!(ran.code, Some(3), "{}", ran.err);
        // The log names the machine; the report is on standard output alone.
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        assert!(
            ran.err.contains("exception 6 (#UD, invalid opcode)"),
            "{}",
            ran.err
        );
        let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(report["exit_code"], 3);
        assert_eq!(report["outcome"], "crashed");
        assert_eq!(report["console"]["text"], "x");
        assert_eq!(report["taken_for"]["format"], "flat");
        let counted = (host == "sim").then_some(4);
        assert_eq!(report["instructions"].as_u64(), counted, "{report}");
        let place = &report["vcpu_reports"][0]["position"];
        assert_eq!(place["linear"], 0x7c06);
        assert_eq!(place["mode"], "real mode, 16-bit");
        assert_eq!(place["bytes"], "0f 0b");
        assert_eq!(place["instruction"], "ud2");
    }
}

#[test]
fn the_json_report_of_a_td_has_its_steps_and_the_account() {
    let ran = run(&["run", "--tech", "tdx", "--json"]);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(report["outcome"], "halted");
    // No place: the state of a TD is its secret.
    assert_eq!(
        report["vcpu_reports"][0]["position"],
        serde_json::Value::Null
    );
    let steps = report["steps"].as_array().unwrap();
    let calls: u64 = steps
        .iter()
        .map(|step| step["seamcalls"].as_u64().unwrap())
        .sum();
    assert!(steps.len() == 4 && calls > 20, "{steps:?}");
    assert!(report["firmware"].is_object(), "{report}");
    let console = report["console"]["text"].as_str().unwrap();
    assert!(
        console.contains("pages are as they were launched"),
        "{console}"
    );
}

#[test]
fn files_that_do_not_run_are_refused_with_their_kind_and_what_to_do() {
    let mut arm = [0; 64];
    arm[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    arm[16..20].copy_from_slice(&[2, 0, 183, 0]);
    let mut sector = vec![0; 0x9000];
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut iso = sector.clone();
    iso[0x8001..0x8006].copy_from_slice(b"CD001");
    for (bytes, kind, hint) in [
        (
            &arm[..],
            "an ELF image for another processor: ",
            "build it for x86-64",
        ),
        (&iso, "a CD image: ", "no disks"),
        (&sector, "a disk image: ", "no disks"),
        (
            b"\x55\xaa\x01\xcb".repeat(128).as_slice(),
            "an option ROM: ",
            "firmware starts",
        ),
        (b"\x1f\x8b\x08\x00", "a compressed file", "unpack it"),
        (b"#!/bin/sh\necho\n", "a text: ", "name an image"),
        (
            &[0xf4, 0x90],
            "no image of a known kind: 0x2 bytes",
            "`flat`",
        ),
        (&[0; 4096], "is blank", "written completely"),
    ] {
        let image = flat(bytes);
        let ran = run(&["run", image.path().to_str().unwrap()]);
        assert_eq!(ran.code, Some(5), "{kind}: {}", ran.err);
        let (said, advice) = ran.err.split_once("hint: ").expect(kind);
        assert!(
            said.contains(kind) && advice.contains(hint),
            "{kind}: {}",
            ran.err
        );
    }
    // A stated format does not make code of nothing.
    let zeros = flat(&[0; 512]);
    let path = zeros.path().to_str().unwrap();
    assert_eq!(run(&["run", path, "--format", "flat"]).code, Some(5));
}

#[test]
fn run_says_what_it_takes_real_firmware_for_and_starts_it_at_the_reset_vector() {
    for host in hosts() {
        if has_seabios() {
            let ran = run(&["run", SEABIOS, "--timeout", "500ms", "--host", host]);
            let words = "taken for a firmware ROM: 0x20000 bytes of whole pages, and a jump at the reset vector";
            assert!(ran.err.contains(words), "{}", ran.err);
        }
        let Some(ovmf) = ovmf() else { continue };
        let ran = run(&["run", &ovmf, "--timeout", "1s", "--json", "--host", host]);
        let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        let taken = &report["taken_for"];
        assert_eq!(
            (&taken["format"], &taken["stated"]),
            (&"firmware".into(), &false.into())
        );
        assert!(
            taken["why"].as_str().unwrap().contains("GUIDed entries"),
            "{taken}"
        );
        // It is past the reset vector, in the ROM or where it has copied itself, and not in flat code.
        assert_eq!(
            report["vcpu_reports"][0]["position"]["cs"]
                .as_u64()
                .map(|cs| cs != 0),
            Some(true)
        );
        assert!(ran.code == Some(0) || ran.code == Some(3), "{}", ran.err);
    }
}

#[test]
fn a_normal_vm_needs_an_image() {
    let ran = run(&["run"]);
    assert_eq!(ran.code, Some(2), "{}", ran.err);
    assert!(
        ran.err.contains("a normal VM needs an image to run"),
        "{}",
        ran.err
    );
}

#[test]
fn an_elf_file_starts_as_a_confidential_vm_at_its_entry_and_its_measurement_is_told() {
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; ret. A TD and guests with encrypted registers have no handler for OUT.
    let prints = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xc3];
    for (tech, code, text, measured) in [
        ("tdx", &[0xc3][..], "", Some("mrtd")),
        ("sev", &prints, "x", None),
        ("sev-es", &[0xc3], "", None),
        ("sev-snp", &[0xc3], "", Some("launch digest")),
    ] {
        let file = flat(&samples::elf(true, 0x20_0000, 0x20_0000, code, 0x1000));
        let path = file.path().to_str().unwrap();
        let ran = run(&["run", "--host", "sim", "--tech", tech, path, "--json"]);
        assert_eq!(ran.code, Some(0), "{tech}: {}{}", ran.out, ran.err);
        let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(report["outcome"], "halted", "{report}");
        assert_eq!(report["console"]["text"], text, "{report}");
        let steps = report["steps"].as_array().unwrap();
        let named = |name: &str| {
            let step = steps.iter().find(|step| {
                let said = step["step"].as_str().unwrap();
                said.eq_ignore_ascii_case(name)
            });
            step.map(|step| step["detail"].as_str().unwrap().len())
        };
        // SHA-384, in hexadecimal digits.
        assert_eq!(measured.map(named), measured.map(|_| Some(96)), "{report}");
        assert_eq!(report["leaks"], serde_json::Value::Array(Vec::new()));
        let refused = run(&[
            "run", "--host", "sim", "--tech", tech, path, "--initrd", path,
        ]);
        assert_eq!(refused.code, Some(2), "{}", refused.err);
        assert!(
            refused.err.contains("--initrd has no meaning"),
            "{}",
            refused.err
        );
    }
}
