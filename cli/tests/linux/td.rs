//! Linux in a TD: firmware, kernel, user space.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::archive::initramfs;
use crate::common::{Ran, ovmf, run};
use crate::{figures, init, kernel, processor_seconds};

/// The variable that names a kernel for TDs.
const TDX: &str = "KVM_OPS_LINUX_TDX";

/// The files of a boot.
struct Boot {
    firmware: String,
    kernel: String,
    archive: tempfile::NamedTempFile,
}

impl Boot {
    /// Of the kernel that a variable of the environment names, with this initial RAM file system. `None` without firmware or kernel.
    fn new(variable: &str, files: &[(&str, Vec<u8>)]) -> Option<Self> {
        let (kernel, firmware) = (kernel(variable)?, ovmf()?);
        let archive = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(archive.path(), initramfs(files)).unwrap();
        Some(Self {
            firmware,
            kernel,
            archive,
        })
    }

    /// Boots until the guest ends. Returns the report, and what was said beside it.
    fn ends(&self, vcpus: u32, more: &[&str]) -> (Value, Ran) {
        let (vcpus, archive) = (vcpus.to_string(), self.archive.path().to_str().unwrap());
        let files = [
            &self.firmware,
            "--kernel",
            &self.kernel,
            "--initrd",
            archive,
        ];
        let size = ["--memory", "512M", "--vcpus", &vcpus, "--timeout", "30m"];
        let ran = run(&[
            &[
                "run",
                "--json",
                "--host",
                "sim",
                "--tech",
                "tdx",
                "--allow-rbp",
            ][..],
            &files,
            &["--append", "console=ttyS0 panic=-1"],
            &size,
            &["--clock", "1795219200"],
            more,
        ]
        .concat());
        let report = serde_json::from_str(&ran.out);
        let report = report.unwrap_or_else(|error| panic!("{error}: {}{}", ran.out, ran.err));
        (report, ran)
    }

    /// Boots until the guest switches off.
    fn run(&self, vcpus: u32, more: &[&str]) -> Value {
        let (report, ran) = self.ends(vcpus, more);
        assert_eq!(ran.code, Some(0), "{report}");
        assert_eq!(report["outcome"], "switched off", "{report}");
        report
    }
}

fn console(report: &Value) -> &str {
    report["console"]["text"].as_str().unwrap()
}

/// The bytes that `init` has printed behind a title.
fn bytes(console: &str, title: &str) -> Vec<u8> {
    let (_, rest) = console.split_once(title).expect(title);
    hex::decode(rest.lines().next().unwrap().trim()).expect(title)
}

/// The value of a field of /proc/cpuinfo, for each processor.
fn fields<'a>(console: &'a str, name: &str) -> Vec<&'a str> {
    let of = |line: &'a str| line.split_once(':').filter(|(key, _)| key.trim() == name);
    console
        .lines()
        .filter_map(of)
        .map(|(_, value)| value.trim())
        .collect()
}

/// Boots a TD with that many vCPUs twice.
fn boots_alike(vcpus: u32) {
    let Some(boot) = Boot::new(TDX, &[("init", init::guest())]) else {
        return;
    };
    let began = processor_seconds();
    let first = boot.run(vcpus, &[]);
    let text = console(&first);
    assert!(text.contains("tdx: Guest detected"), "{text}");
    // What the kernel tells of its processors, by the program in user space.
    let numbers: Vec<_> = (0..vcpus).map(|n| n.to_string()).collect();
    assert_eq!(fields(text, "processor"), numbers, "{text}");
    for flags in fields(text, "flags") {
        assert!(flags.split(' ').any(|flag| flag == "tdx_guest"), "{flags}");
    }
    let (_, online) = text.split_once(init::ONLINE).expect("the list of vCPUs");
    let all = if vcpus == 1 {
        "0".into()
    } else {
        format!("0-{}", vcpus - 1)
    };
    assert_eq!(online.lines().next().map(str::trim), Some(&*all));
    figures(&format!("Linux in a TD, vCPUs: {vcpus}"), &first, began);
    let second = boot.run(vcpus, &[]);
    assert_eq!(second["instructions"], first["instructions"]);
    assert_eq!(console(&second), text);
}

#[test]
fn a_kernel_boots_in_a_td_to_user_space_and_switches_off_with_the_same_instructions_each_time() {
    boots_alike(1);
}

#[test]
fn a_kernel_starts_the_other_vcpus_of_its_td_and_runs_are_still_alike() {
    boots_alike(4);
}

/// The modules by which a kernel tells its TD's evidence, in the order of their loading, from its package.
fn modules(kernel: &str) -> Option<Vec<(String, Vec<u8>)>> {
    /// Each with its place in Linux 6.12 and, if it has moved, in 7.2.
    const FILES: [&[&str]; 3] = [
        &["fs/configfs/configfs.ko.xz"],
        &[
            "drivers/virt/coco/tsm.ko.xz",
            "drivers/virt/coco/guest/tsm_report.ko.xz",
        ],
        &["drivers/virt/coco/tdx-guest/tdx-guest.ko.xz"],
    ];
    let directory = module_directory(Path::new(kernel))?;
    let read = |files: &[&str]| {
        let mut paths = files.iter().map(|file| directory.join("kernel").join(file));
        let path = paths.find(|path| path.is_file())?;
        let name = path.file_name()?.to_str()?.to_owned();
        Some((name, std::fs::read(path).ok()?))
    };
    FILES.into_iter().map(read).collect()
}

/// Packages have the kernel beside its modules, or in `boot`.
fn module_directory(kernel: &Path) -> Option<PathBuf> {
    let directory = kernel.parent()?;
    if directory.join("kernel").is_dir() {
        return Some(directory.to_owned());
    }
    let release = kernel.file_name()?.to_str()?.strip_prefix("vmlinuz-")?;
    let places = ["lib/modules", "usr/lib/modules"];
    let places = places.map(|place| directory.with_file_name(place).join(release));
    places.into_iter().find(|place| place.is_dir())
}

/// The evidence that Linux gives its user space is what a verifier accepts: the quote is that of this launch, and the event log
/// in the guest's memory replays to its RTMRs.
#[test]
fn a_verifier_accepts_the_quote_and_the_event_log_that_linux_gives() {
    let Some(modules) = kernel(TDX).map(|kernel| modules(&kernel)) else {
        return;
    };
    let Some(mut files) = modules else {
        println!("skipped: no modules beside the kernel");
        return;
    };
    let names: Vec<_> = files.iter().map(|(name, _)| format!("/{name}")).collect();
    files.push(("init".into(), init::evidence(&names)));
    let files: Vec<_> = files
        .iter()
        .map(|(name, bytes)| (&**name, bytes.clone()))
        .collect();
    let Some(boot) = Boot::new(TDX, &files) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let ran = boot.run(1, &["--collateral", &file("collateral.json")]);
    let console = console(&ran);
    let (report, quote) = (bytes(console, init::REPORT), bytes(console, init::QUOTE));
    std::fs::write(file("quote.bin"), &quote).unwrap();
    // REPORTMACSTRUCT.REPORTDATA, and TDINFO, which the quote's body repeats.
    assert_eq!(report[128..192], init::DATA);
    let measured = &ran["measured"];
    let rtmrs = [0, 1, 2, 3].map(|n| measured["rtmr"][n].as_str().unwrap());
    let told = run(&["measure", "tdx", &boot.firmware, "--json"]);
    let told: Value = serde_json::from_str(&told.out).unwrap();
    let zeros = "00".repeat(48);
    let (data, mr_seam) = (
        hex::encode(init::DATA),
        hex::encode(soft_tdx_module::report::mr_seam()),
    );
    let mut question = vec![
        "attest",
        "verify",
        directory.path().to_str().unwrap(),
        "--json",
    ];
    question.extend([
        "--root",
        "software",
        "--attributes",
        "0x10000000",
        "--xfam",
        "0x3",
    ]);
    question.extend([
        "--mrtd",
        told["mrtd"]["single"].as_str().unwrap(),
        "--report-data",
        &data,
    ]);
    question.extend(["--mrseam", &mr_seam, "--mrconfigid", &zeros]);
    question.extend(["--mrowner", &zeros, "--mrownerconfig", &zeros]);
    for (option, value) in ["--rtmr0", "--rtmr1", "--rtmr2", "--rtmr3"]
        .into_iter()
        .zip(&rtmrs)
    {
        question.extend([option, *value]);
    }
    // Debian 12's firmware measures nothing, and has no log.
    let log = bytes(console, init::EVENT_LOG);
    let log_file = file("event_log.bin");
    if log.is_empty() {
        assert_eq!(rtmrs, [&*zeros; 4]);
        assert_eq!(measured["event_log"], Value::Null);
    } else {
        // The program finds it in memory, too.
        let replays = &measured["event_log"]["replays"];
        assert_eq!(*replays, Value::from(vec![true; 4]), "{measured}");
        std::fs::write(&log_file, &log).unwrap();
        question.extend(["--event-log", &log_file]);
    }
    let verdict = run(&question);
    assert_eq!(verdict.code, Some(0), "{}{}", verdict.out, verdict.err);
}

/// True if the configuration beside a kernel says that it is built without support of TDX.
fn lacks_tdx(kernel: &str) -> bool {
    let config = kernel.replace("vmlinuz-", "config-");
    std::fs::read_to_string(config).is_ok_and(|text| !text.contains("CONFIG_INTEL_TDX_GUEST=y"))
}

#[test]
fn a_kernel_without_support_of_tdx_ends_in_a_triple_fault_and_nothing_is_lost() {
    const ANY: &str = "KVM_OPS_LINUX";
    if !kernel(ANY).is_some_and(|kernel| lacks_tdx(&kernel)) {
        println!(
            "skipped: {ANY} names no kernel whose configuration is without CONFIG_INTEL_TDX_GUEST"
        );
        return;
    }
    let Some(boot) = Boot::new(ANY, &[("init", init::guest())]) else {
        return;
    };
    let (report, ran) = boot.ends(1, &[]);
    // Its EFI stub runs, and the kernel has no handler for #VE.
    assert!(console(&report).contains("EFI stub: "), "{report}");
    assert_eq!(
        (ran.code, &report["outcome"]),
        (Some(3), &"triple fault".into())
    );
    // Where, and with which stack and table.
    let line = |line: &&str| line.contains("the guest has no handler for an exception");
    let line = ran.err.lines().find(line).expect("the place");
    for register in ["rip=0x", "rsp=0x", "cr2=0x", "idt=0x"] {
        assert!(line.contains(register), "{line}");
    }
    assert_eq!(report["leaks"], Value::Array(Vec::new()));
    assert_eq!(
        report["firmware"]["disagreements"],
        Value::Array(Vec::new())
    );
}
