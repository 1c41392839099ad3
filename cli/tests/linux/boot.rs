//! Boots by firmware: OVMF, kernel, user space.

use serde_json::Value;
use tempfile::NamedTempFile;

use crate::archive::initramfs;
use crate::common::{Ran, named, run};
use crate::modules::with_modules;
use crate::{figures, init, processor_seconds};

/// Guests of a technology.
pub(crate) struct Guests {
    pub(crate) name: &'static str,
    /// Options of `kvm-ops run`.
    pub(crate) options: &'static [&'static str],
    /// Finds their firmware.
    pub(crate) firmware: fn() -> Option<String>,
    /// What the kernel says of the technology.
    pub(crate) says: &'static str,
    /// The flag of the technology in /proc/cpuinfo.
    pub(crate) flag: Option<&'static str>,
}

/// The files of a boot.
pub(crate) struct Boot {
    options: &'static [&'static str],
    pub(crate) firmware: String,
    pub(crate) kernel: String,
    archive: NamedTempFile,
}

/// What the kernel is told.
pub(crate) const CMDLINE: &str = "console=ttyS0 panic=-1";

impl Boot {
    /// Of the kernel that a variable of the environment names, with this initial RAM file system. `None` without firmware or kernel.
    pub(crate) fn new(guests: &Guests, variable: &str, files: &[(&str, Vec<u8>)]) -> Option<Self> {
        let kernel = named(variable)?;
        let archive = NamedTempFile::new().unwrap();
        std::fs::write(archive.path(), initramfs(files)).unwrap();
        Self::of(guests, kernel, archive)
    }

    /// Of a kernel with modules from its package, in the order of their loading, and an `init` that is told their paths. `None`
    /// without firmware, kernel or modules.
    pub(crate) fn with_modules(
        guests: &Guests,
        variable: &str,
        files: &[&[&str]],
        init: fn(&[String]) -> Vec<u8>,
    ) -> Option<Self> {
        let kernel = named(variable)?;
        let archive = with_modules(&kernel, files, init)?;
        Self::of(guests, kernel, archive)
    }

    fn of(guests: &Guests, kernel: String, archive: NamedTempFile) -> Option<Self> {
        Some(Self {
            options: guests.options,
            firmware: (guests.firmware)()?,
            kernel,
            archive,
        })
    }

    /// The initial RAM file system.
    pub(crate) fn archive(&self) -> &str {
        self.archive.path().to_str().unwrap()
    }

    /// Boots until the guest ends. Returns the report, and what was said beside it.
    pub(crate) fn ends(&self, vcpus: u32, more: &[&str]) -> (Value, Ran) {
        let vcpus = vcpus.to_string();
        let files = [
            &self.firmware,
            "--kernel",
            &self.kernel,
            "--initrd",
            self.archive(),
        ];
        let size = ["--memory", "512M", "--vcpus", &vcpus, "--timeout", "30m"];
        let ran = run(&[
            &["run", "--json", "--host", "sim"][..],
            self.options,
            &files,
            &["--append", CMDLINE],
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
    pub(crate) fn run(&self, vcpus: u32, more: &[&str]) -> Value {
        let (report, ran) = self.ends(vcpus, more);
        assert_eq!(ran.code, Some(0), "{report}");
        assert_eq!(report["outcome"], "switched off", "{report}");
        report
    }
}

pub(crate) fn console(report: &Value) -> &str {
    report["console"]["text"].as_str().unwrap()
}

/// The bytes that `init` has printed behind a title.
pub(crate) fn bytes(console: &str, title: &str) -> Vec<u8> {
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

/// Checks what the kernel tells of its processors, by the program in user space.
pub(crate) fn has_processors(text: &str, vcpus: u32) {
    let numbers: Vec<_> = (0..vcpus).map(|n| n.to_string()).collect();
    assert_eq!(fields(text, "processor"), numbers, "{text}");
    let (_, online) = text.split_once(init::ONLINE).expect("the list of vCPUs");
    let all = if vcpus == 1 {
        "0".into()
    } else {
        format!("0-{}", vcpus - 1)
    };
    assert_eq!(online.lines().next().map(str::trim), Some(&*all));
}

/// The kernel trusts the clocks of all vCPUs, and waits for none of them in vain.
pub(crate) fn trusts_its_vcpus(text: &str) {
    for complaint in [
        "TSC warp",
        "unstable",
        "soft lockup",
        "detected stall",
        // At the start of a line: notes on mitigations have the word, too.
        "] WARNING:",
        "] BUG:",
    ] {
        assert!(!text.contains(complaint), "{complaint}: {text}");
    }
}

/// Boots a guest with that many vCPUs, which execute at the same time.
pub(crate) fn boots_on_threads(guests: &Guests, variable: &str, vcpus: u32) {
    let Some(boot) = Boot::new(guests, variable, &[("init", init::guest())]) else {
        return;
    };
    let began = processor_seconds();
    let report = boot.run(vcpus, &["--threads"]);
    let text = console(&report);
    assert!(text.contains(guests.says), "{text}");
    has_processors(text, vcpus);
    trusts_its_vcpus(text);
    let title = format!("Linux in {}, vCPUs at the same time: {vcpus}", guests.name);
    figures(&title, &report, began);
}

/// Boots a guest with that many vCPUs twice.
pub(crate) fn boots_alike(guests: &Guests, variable: &str, vcpus: u32) {
    let Some(boot) = Boot::new(guests, variable, &[("init", init::guest())]) else {
        return;
    };
    let began = processor_seconds();
    let first = boot.run(vcpus, &[]);
    let text = console(&first);
    assert!(text.contains(guests.says), "{text}");
    has_processors(text, vcpus);
    if let Some(flag) = guests.flag {
        for flags in fields(text, "flags") {
            assert!(flags.split(' ').any(|found| found == flag), "{flags}");
        }
    }
    figures(
        &format!("Linux in {}, vCPUs: {vcpus}", guests.name),
        &first,
        began,
    );
    let second = boot.run(vcpus, &[]);
    assert_eq!(second["instructions"], first["instructions"]);
    assert_eq!(console(&second), text);
}
