//! Runs fleets, and checks their reports.

mod common;

use common::{Ran, examples, has_kvm, run, run_with_input};
use serde_json::Value;

fn report(ran: &Ran) -> Value {
    serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {}{}", ran.out, ran.err))
}

/// Checks that the sums are those of the VMs and that nothing leaked.
fn adds_up(report: &Value) {
    let vms: Vec<&Value> = report["vms"].as_array().expect("an array").iter().collect();
    let totals = &report["totals"];
    let ran: Vec<_> = vms.iter().filter(|vm| vm["status"] != "skipped").collect();
    let sum = |key: &str| -> u64 { ran.iter().map(|vm| vm[key].as_u64().expect(key)).sum() };
    assert_eq!(totals["vms"], vms.len());
    for status in ["ok", "failed", "stopped", "skipped"] {
        assert_eq!(
            totals[status],
            vms.iter().filter(|vm| vm["status"] == status).count()
        );
    }
    for key in ["vcpus", "exits", "pages"] {
        assert_eq!(totals[key], sum(key), "{key}");
    }
    for vm in &ran {
        let by_kind: u64 = vm["exits_by_kind"]
            .as_object()
            .expect("an object")
            .values()
            .map(|n| n.as_u64().expect("a number"))
            .sum();
        assert_eq!(vm["exits"], by_kind, "{vm}");
        let vcpus = vm["vcpu_reports"].as_array().expect("an array");
        assert_eq!(vm["vcpus"], vcpus.len(), "{vm}");
        let by_vcpu: u64 = vcpus
            .iter()
            .map(|vcpu| vcpu["exits"].as_u64().unwrap())
            .sum();
        assert_eq!(vm["exits"], by_vcpu, "{vm}");
        assert_eq!(vm["memory"], vm["pages"].as_u64().unwrap() * 4096);
    }
    assert_eq!(totals["leaks"], 0);
    firmware_adds_up(report);
    assert!(report["after"]["descriptors"].as_u64() <= report["before"]["descriptors"].as_u64());
}

/// Checks that confidential VMs returned all resources, by the counts of the firmware, the host's
/// allocator and the teardowns.
fn firmware_adds_up(report: &Value) {
    for account in report["firmware"].as_array().expect("an array") {
        let number = |of: &str, key: &str| account[of][key].as_u64().expect(key);
        for (of, taken) in [("pages", "taken"), ("keys", "leased")] {
            let back = number(of, "freed") + number(of, "leaked");
            assert_eq!(number(of, taken), back, "{of}: {account}");
            assert_eq!(number(of, "leaked"), 0, "{of}: {account}");
            assert_eq!(number(of, "out"), 0, "{of}: {account}");
        }
        assert_eq!(
            account["pages"]["given"], account["pages"]["returned"],
            "{account}"
        );
        assert_eq!(account["keys"]["leased"], account["keys"]["returned"]);
        assert_eq!(account["disagreements"].as_array().map(Vec::len), Some(0));
        let by_name = account["calls_by_name"].as_object().expect("an object");
        let calls: u64 = by_name.values().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(account["calls"], calls, "{account}");
        // The sums of the VMs' own reports equal the firmware's account.
        let vms = report["vms"].as_array().unwrap();
        let tech = |vm: &&Value| account["techs"].as_array().unwrap().contains(&vm["tech"]);
        let sum = |key| -> u64 {
            vms.iter()
                .filter(tech)
                .map(|vm| vm[key].as_u64().unwrap())
                .sum()
        };
        assert_eq!(number("pages", "freed"), sum("pages_freed"), "{account}");
        assert_eq!(number("keys", "freed"), sum("keys_freed"), "{account}");
    }
}

fn vm<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["vms"]
        .as_array()
        .unwrap()
        .iter()
        .find(|vm| vm["name"] == name)
        .unwrap_or_else(|| panic!("no VM {name}: {report}"))
}

/// Runs the built-in fleet on one host: every guest ran, and reported its result.
fn built_in(host: &str) {
    let ran = run(&["fleet", "--host", host, "--json"]);
    let report = report(&ran);
    assert_eq!(ran.code, Some(0), "{report}");
    adds_up(&report);
    for (name, payload_result, exits_at_least) in [
        ("hello", Value::Null, 19),
        ("sieve-0", 1028.into(), 24),
        ("sieve-1", 1028.into(), 24),
        ("crc32-0", 0x6a19_1f4e_u32.into(), 27),
        ("mmio", 0x8afa_3c14_u32.into(), 58),
        ("pair", 32.into(), 30),
    ] {
        let vm = vm(&report, name);
        assert_eq!(vm["status"], "ok", "{vm}");
        assert_eq!(vm["host"], host, "{vm}");
        assert_eq!(vm["result"], payload_result, "{vm}");
        assert!(vm["exits"].as_u64().unwrap() >= exits_at_least, "{vm}");
    }
    assert_eq!(
        vm(&report, "sieve-0")["console"]["text"],
        "primes below 8192: 1028\n"
    );
}

#[test]
fn the_built_in_fleet_runs_on_the_software_platform() {
    built_in("sim");
}

#[test]
fn the_built_in_fleet_runs_on_dev_kvm() {
    if has_kvm() {
        built_in("kvm");
    }
}

#[test]
fn vms_of_both_vendors_run_side_by_side_on_the_software_platform() {
    let report = report(&run(&["fleet", "--host", "sim", "--json"]));
    assert_eq!(vm(&report, "intel")["tech"], "vmx");
    assert_eq!(vm(&report, "amd")["tech"], "svm");
}

#[test]
fn the_table_has_a_line_for_each_vm_and_ends_with_the_sums() {
    let ran = run(&["fleet", "--host", "sim"]);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    for name in ["hello", "sieve-0", "sieve-1", "crc32-0", "mmio", "pair"] {
        let line = ran
            .out
            .lines()
            .find(|line| line.starts_with(name))
            .expect(name);
        assert!(line.contains("sim"), "{line}");
        assert!(
            ran.err.contains(&format!("{name}: ")),
            "progress: {}",
            ran.err
        );
    }
    let sums = ran
        .out
        .lines()
        .find(|line| line.contains(" VMs: "))
        .expect("the sums");
    assert!(
        sums.starts_with("18 VMs: ") && sums.contains("nothing leaked"),
        "{sums}"
    );
}

#[test]
fn the_shown_default_is_the_fleet_that_runs() {
    let shown = run(&["fleet", "--show-default"]);
    assert_eq!(shown.code, Some(0));
    let names = |ran: &Ran| -> Vec<Value> {
        let vms = report(ran)["vms"].as_array().unwrap().clone();
        vms.iter().map(|vm| vm["name"].clone()).collect()
    };
    let from_input = run_with_input(&["fleet", "-", "--host", "sim", "--json"], &shown.out);
    assert_eq!(
        names(&from_input),
        names(&run(&["fleet", "--host", "sim", "--json"]))
    );
}

#[test]
fn every_example_runs_where_its_hosts_are() {
    for file in examples() {
        let path = file.to_str().unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        let image = text
            .lines()
            .find_map(|line| line.strip_prefix("image = \""));
        if let Some(image) = image.map(|image| image.trim_end_matches('"'))
            && !std::path::Path::new(image).is_file()
        {
            println!("skipped: {path} needs {image}");
            continue;
        }
        let ran = run(&["fleet", path, "--json"]);
        assert_eq!(ran.code, Some(0), "{path}: {}{}", ran.out, ran.err);
        adds_up(&report(&ran));
    }
}

/// An image beside built-in programs and confidential VMs, all on the software platform.
#[test]
fn images_run_beside_programs_on_the_software_platform_and_are_held_against_the_file() {
    let directory = tempfile::tempdir().unwrap();
    // mov dx, 0x402; mov al, 'x'; out dx, al; mov dx, 0x4f0; mov eax, 0x12345678; out dx, eax; hlt
    let code = b"\xba\x02\x04\xb0x\xee\xba\xf0\x04\x66\xb8\x78\x56\x34\x12\x66\xef\xf4";
    std::fs::write(directory.path().join("code.bin"), code).unwrap();
    let fleet = directory.path().join("fleet.toml");
    let vm = |name: &str, kind: &str, result: u32| {
        format!(
            "[[vm]]\nname = \"{name}\"\nkind = \"{kind}\"\nimage = \"code.bin\"\n\
             format = \"flat\"\nexpect = {{ end = \"halt\", console = \"x\", result = {result} }}\n"
        )
    };
    let text = [
        vm("intel", "vmx", 0x1234_5678),
        vm("amd", "svm", 0x1234_5678),
        vm("wrong", "normal", 1),
        "[[vm]]\nname = \"program\"\npayload = \"hello\"\n".into(),
        "[[vm]]\nname = \"td\"\nkind = \"tdx\"\npayload = \"hello\"\n".into(),
    ];
    std::fs::write(&fleet, text.concat()).unwrap();
    let ran = run(&["fleet", fleet.to_str().unwrap(), "--host", "sim", "--json"]);
    assert_eq!(ran.code, Some(3), "{}", ran.err);
    let report = report(&ran);
    adds_up(&report);
    for (name, status, instructions) in [
        ("intel", "ok", Some(7)),
        ("amd", "ok", Some(7)),
        ("wrong", "failed", Some(7)),
        ("program", "ok", None),
        ("td", "ok", None),
    ] {
        let vm = self::vm(&report, name);
        assert_eq!(vm["status"], status, "{vm}");
        assert_eq!(vm["instructions"].as_u64(), instructions, "{vm}");
    }
    assert_eq!(report["totals"]["instructions"], 21);
}

/// Every check of a fleet can fail.
#[test]
fn a_guest_that_does_otherwise_than_expected_fails_the_fleet_and_not_its_neighbours() {
    let fleet = r#"
        defaults.host = "sim"
        [[vm]]
        name = "end"
        payload = "sieve"
        expect.end = "shutdown"
        [[vm]]
        name = "console"
        payload = "sieve"
        expect.console = "primes below 8192: 1029"
        [[vm]]
        name = "result"
        payload = "sieve"
        expect.result = 0x405
        [[vm]]
        name = "good"
        payload = "sieve"
    "#;
    let ran = run_with_input(&["fleet", "-", "--json"], fleet);
    assert_eq!(ran.code, Some(3));
    let report = report(&ran);
    adds_up(&report);
    for (name, why) in [
        ("end", "halted, where shutdown was expected"),
        (
            "console",
            "the console does not contain \"primes below 8192: 1029\"",
        ),
        ("result", "result 0x404, where 0x405 was expected"),
    ] {
        let vm = vm(&report, name);
        assert_eq!(vm["status"], "failed", "{vm}");
        assert_eq!(vm["problems"], serde_json::json!([why]));
    }
    assert_eq!(vm(&report, "good")["status"], "ok");

    let ran = run_with_input(&["fleet", "-"], fleet);
    assert_eq!(ran.code, Some(3));
    assert!(
        ran.out
            .contains("failed: result: result 0x404, where 0x405"),
        "{}",
        ran.out
    );
}

/// On both hosts: the software platform stops a program, KVM kicks the processor out of a loop.
#[test]
fn a_guest_that_takes_too_long_is_stopped_and_fails_unless_that_is_expected() {
    let fleet = "defaults.timeout = \"300ms\"\n\
                 [[vm]]\nname = \"expected\"\npayload = \"spin\"\n\
                 [[vm]]\nname = \"unexpected\"\npayload = \"spin\"\nexpect.end = \"halt\"\n";
    for (host, there) in [("sim", true), ("kvm", has_kvm())] {
        if !there {
            continue;
        }
        let ran = run_with_input(&["fleet", "-", "--host", host, "--json"], fleet);
        assert_eq!(ran.code, Some(3), "{}", ran.out);
        let report = report(&ran);
        adds_up(&report);
        for (name, status) in [("expected", "ok"), ("unexpected", "failed")] {
            let vm = vm(&report, name);
            assert_eq!(vm["outcome"], "timed out", "{vm}");
            assert_eq!(vm["status"], status, "{vm}");
            assert_eq!(vm["console"]["text"], "until it is stopped\n");
            assert!(vm["seconds"].as_f64().unwrap() >= 0.3, "{vm}");
        }
    }
}

#[test]
fn an_optional_vm_that_no_host_can_hold_is_left_out_and_the_reason_is_told() {
    // The library holds no TDs on /dev/kvm.
    let fleet = "[[vm]]\nname = \"td\"\nkind = \"tdx\"\nhost = \"kvm\"\npayload = \"hello\"\n\
                 optional = true\n[[vm]]\nname = \"ok\"\npayload = \"hello\"\n";
    let ran = run_with_input(&["fleet", "-", "--host", "sim", "--json"], fleet);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let report = report(&ran);
    adds_up(&report);
    assert_eq!(vm(&report, "td")["status"], "skipped");
    assert!(
        vm(&report, "td")["problems"][0]
            .as_str()
            .unwrap()
            .contains("kvm")
    );
    assert_eq!(vm(&report, "ok")["status"], "ok");
}

/// Checks that confidential VMs do the same work as normal VMs in private memory, with the expected
/// measurement.
fn confidential(report: &Value, names: &[(&str, &str)]) {
    for (name, like) in names {
        let (vm, normal) = (vm(report, name), vm(report, like));
        assert_eq!(vm["status"], "ok", "{vm}");
        assert_eq!(vm["result"], normal["result"], "{vm}");
        assert_eq!(vm["console"]["text"], normal["console"]["text"], "{vm}");
        let digest = vm["measurement"]["firmware"].as_str().expect("a digest");
        assert!(digest.len() >= 64, "{vm}");
        assert_eq!(vm["measurement"]["off_line"], digest, "{vm}");
        assert!(vm["pages_freed"].as_u64() > Some(4), "{vm}");
        assert_eq!(vm["keys_freed"], 1, "{vm}");
        assert!(normal["measurement"].is_null(), "{normal}");
    }
}

/// Checks the number of successful calls, by the firmware's count. Concurrent VMs may cause
/// retries, which do not count.
fn counted(report: &Value, firmware: &str, calls: &[(&str, u64)]) {
    let accounts = report["firmware"].as_array().unwrap();
    let account = accounts
        .iter()
        .find(|account| account["firmware"] == firmware);
    let account = account.expect("an account");
    for (call, times) in calls {
        let refused: u64 = account["refused"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(what, _)| what.split(' ').next() == Some(call))
            .map(|(_, n)| n.as_u64().unwrap())
            .sum();
        let made = account["calls_by_name"][call].as_u64().unwrap_or(0);
        assert_eq!(made - refused, *times, "{call}: {account}");
    }
}

#[test]
fn tds_run_beside_normal_vms_and_the_module_is_left_as_it_was() {
    let ran = run(&["fleet", "--json"]);
    let report = report(&ran);
    assert_eq!(ran.code, Some(0), "{report}");
    adds_up(&report);
    confidential(
        &report,
        &[
            ("td-0", "sieve-0"),
            ("td-1", "sieve-1"),
            ("td-mmio", "mmio"),
            ("td-pair", "pair"),
        ],
    );
    counted(
        &report,
        "TDX module",
        &[
            ("TDH.MNG.CREATE", 4),
            ("TDH.MNG.KEY.FREEID", 4),
            ("TDH.MR.FINALIZE", 4),
            ("TDH.VP.CREATE", 5),
            ("TDH.MEM.PAGE.ADD", 4 * 6),
            ("TDH.MR.EXTEND", 4 * 4 * 16),
        ],
    );
}

#[test]
fn sev_guests_run_beside_normal_vms_and_the_amd_sp_is_left_as_it_was() {
    let ran = run(&["fleet", "--json"]);
    let report = report(&ran);
    assert_eq!(ran.code, Some(0), "{report}");
    adds_up(&report);
    confidential(
        &report,
        &[
            ("sev", "crc32-0"),
            ("sev-es", "mmio"),
            ("snp-0", "sieve-0"),
            ("snp-1", "sieve-1"),
            ("snp-pair", "pair"),
        ],
    );
    let digest = |name| vm(&report, name)["measurement"]["firmware"].clone();
    assert_eq!(digest("snp-0"), digest("snp-1"));
    assert_ne!(digest("snp-0"), digest("snp-pair"), "vCPUs are measured");
    counted(
        &report,
        "AMD SP",
        &[
            ("LAUNCH_START", 2),
            ("LAUNCH_UPDATE_DATA", 2 * 4),
            ("LAUNCH_UPDATE_VMSA", 1),
            ("DECOMMISSION", 2),
            ("SNP_LAUNCH_START", 3),
            // Four pages for each guest, and a VMSA for each vCPU.
            ("SNP_LAUNCH_UPDATE", 3 * 4 + 4),
            ("SNP_DECOMMISSION", 3),
        ],
    );
}

/// Every technology with every payload that ends by itself.
#[test]
fn every_payload_runs_on_every_technology_of_the_software_platform() {
    for kind in ["vmx", "tdx", "svm", "sev", "sev-es", "sev-snp"] {
        let vms = ["hello", "sieve", "crc32", "mmio", "pair"].map(|payload| {
            format!("[[vm]]\nname = \"{payload}\"\nkind = \"{kind}\"\npayload = \"{payload}\"\n")
        });
        let ran = run_with_input(&["fleet", "-", "--host", "sim", "--json"], &vms.concat());
        assert_eq!(ran.code, Some(0), "{kind}: {}{}", ran.out, ran.err);
        adds_up(&report(&ran));
    }
}

#[test]
fn a_fleet_without_confidential_vms_asks_no_firmware() {
    let fleet = "[[vm]]\nname = \"ok\"\npayload = \"hello\"\n";
    let ran = run_with_input(&["fleet", "-", "--host", "sim", "--json"], fleet);
    assert_eq!(report(&ran)["firmware"], Value::Array(Vec::new()));
}

#[test]
fn a_vm_that_does_not_do_as_expected_is_told_with_its_place_unless_that_is_secret() {
    let vm = |kind: &str, host: &str| {
        format!(
            "[[vm]]\nname = \"vm\"\nkind = \"{kind}\"\nhost = \"{host}\"\npayload = \"spin\"\n\
             timeout = \"200ms\"\nexpect = {{ end = \"halt\" }}\n"
        )
    };
    let ran = run_with_input(&["fleet", "-"], &vm("tdx", "sim"));
    assert_eq!(ran.code, Some(3), "{}", ran.err);
    let words = "its registers are protected from the host";
    assert!(ran.out.contains(words), "{}", ran.out);
    if has_kvm() {
        let ran = run_with_input(&["fleet", "-"], &vm("normal", "kvm"));
        assert_eq!(ran.code, Some(3), "{}", ran.err);
        assert!(ran.out.contains("vCPU 0 at 0000:7c"), "{}", ran.out);
    }
}
