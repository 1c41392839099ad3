//! alioth, unmodified, under the preloaded library. `KVM_OPS_ALIOTH` names the program; `KVM_OPS_QEMU` the directory with
//! Debian's package ovmf, unpacked, whose firmware its confidential guests start; `KVM_OPS_LINUX` and
//! `KVM_OPS_INITRD` what a normal VM boots, as for QEMU. Without them the tests say that they are skipped.

#[path = "common/named.rs"]
mod named;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use named::named;

/// A guest that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(600);
/// The first exit of a guest that executes.
const LEFT: &str = "KVM_RUN, 0x0) = 0";

/// A run of alioth, with its guest's console and the log of its calls in files.
struct Run {
    alioth: Child,
    console: PathBuf,
    calls: PathBuf,
}

impl Run {
    fn new(alioth: &Path, name: &str, vendor: &str, arguments: &[&str]) -> Self {
        let folder = std::env::temp_dir();
        let file = |kind| folder.join(format!("kvm-ops-{}-{name}-{kind}", std::process::id()));
        let (console, calls) = (file("console"), file("calls"));
        let own = std::env::current_exe().expect("a path");
        let alioth = Command::new(alioth)
            .arg("boot")
            .arg("--console")
            .arg(format!("log,path={}", console.display()))
            .args(arguments)
            .env("LD_PRELOAD", own.with_file_name("libkvm_ops_preload.so"))
            .env("KVM_OPS_WITH", vendor)
            .env("KVM_OPS_LOG", &calls)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("alioth");
        Self {
            alioth,
            console,
            calls,
        }
    }

    /// Waits until a file has a text, or alioth ends. Returns what it has.
    fn wait(&mut self, file: &Path, text: &str) -> String {
        self.wait_until(file, |found| found.contains(text))
    }

    /// Waits until alioth ends. Returns what its guest wrote, and whether its exit code was 0.
    fn ends(&mut self) -> (String, bool) {
        let console = self.wait_until(&self.console.clone(), |_| false);
        let ended = self.alioth.try_wait().expect("a child");
        (console, ended.is_some_and(|status| status.success()))
    }

    fn wait_until(&mut self, file: &Path, done: impl Fn(&str) -> bool) -> String {
        let started = Instant::now();
        loop {
            let ended = self.alioth.try_wait().expect("a child").is_some();
            let found = std::fs::read_to_string(file).unwrap_or_default();
            if done(&found) || ended || started.elapsed() > LIMIT {
                return found;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // It may have ended, and a file may not be there.
        let _ = self.alioth.kill();
        let _ = self.alioth.wait();
        let _ = std::fs::remove_file(&self.console);
        let _ = std::fs::remove_file(&self.calls);
    }
}

/// A confidential guest is launched by these calls in this order, and its firmware executes.
fn launches(name: &str, vendor: &str, kind: &str, firmware: &str, calls: &[&str]) {
    let (Some(alioth), Some(folder)) = (named("KVM_OPS_ALIOTH"), named("KVM_OPS_QEMU")) else {
        return;
    };
    let firmware = folder.join("usr/share/ovmf").join(firmware);
    let firmware = firmware.to_str().expect("text");
    let arguments = [
        "--memory",
        "size=128M",
        "--coco",
        kind,
        "--firmware",
        firmware,
    ];
    let mut run = Run::new(&alioth, name, vendor, &arguments);
    let log = run.wait(&run.calls.clone(), LEFT);
    let mut done = log.lines().filter(|line| line.ends_with(" = 0"));
    for call in calls.iter().chain([&LEFT]) {
        let follows = done.any(|line| line.contains(call));
        assert!(follows, "{call} is missing:\n{log}");
    }
}

#[test]
fn firmware_executes_in_a_td() {
    let calls = [
        "KVM_TDX_CAPABILITIES",
        "KVM_TDX_INIT_VM",
        "KVM_TDX_INIT_VCPU",
        "KVM_TDX_INIT_MEM_REGION",
        "KVM_TDX_FINALIZE_VM",
    ];
    let kind = "tdx,attr=0x10000000";
    launches("td", "intel", kind, "OVMF.inteltdx.ms.fd", &calls);
}

#[test]
fn firmware_executes_in_a_sev_guest() {
    let calls = [
        "KVM_SEV_INIT,",
        "KVM_SEV_LAUNCH_START",
        "KVM_SEV_LAUNCH_UPDATE_DATA",
        "KVM_SEV_LAUNCH_MEASURE",
        "KVM_SEV_LAUNCH_FINISH",
    ];
    launches("sev", "amd", "sev,policy=0x1", "OVMF.amdsev.fd", &calls);
}

#[test]
fn firmware_executes_in_a_sev_es_guest() {
    let calls = [
        "KVM_SEV_ES_INIT,",
        "KVM_SEV_LAUNCH_START",
        "KVM_SEV_LAUNCH_UPDATE_DATA",
        "KVM_SEV_LAUNCH_UPDATE_VMSA",
        "KVM_SEV_LAUNCH_MEASURE",
        "KVM_SEV_LAUNCH_FINISH",
    ];
    launches("es", "amd", "sev,policy=0x5", "OVMF.amdsev.fd", &calls);
}

#[test]
fn firmware_executes_in_an_snp_guest() {
    let calls = [
        "KVM_SEV_INIT2",
        "KVM_SEV_SNP_LAUNCH_START",
        "KVM_SEV_SNP_LAUNCH_UPDATE",
        "KVM_SEV_SNP_LAUNCH_FINISH",
    ];
    launches("snp", "amd", "snp,policy=0x30000", "OVMF.amdsev.fd", &calls);
}

/// What `init` of the archive reads from the disk.
const DISK: &str = "a disk of kvm-ops";

#[test]
fn linux_boots_in_a_normal_vm_and_switches_off() {
    let (Some(alioth), Some(kernel)) = (named("KVM_OPS_ALIOTH"), named("KVM_OPS_LINUX")) else {
        return;
    };
    let Some(archive) = named("KVM_OPS_INITRD") else {
        return;
    };
    let disk = Path::new(env!("CARGO_TARGET_TMPDIR")).join("alioth-disk");
    let mut bytes = format!("{DISK}\n").into_bytes();
    bytes.resize(1 << 20, 0);
    std::fs::write(&disk, bytes).expect("a disk");
    let drive = format!("file,path={},readonly=true", disk.display());
    for (vcpus, online) in [("1", "0"), ("2", "0-1")] {
        let arguments = [
            "--cpu",
            &format!("count={vcpus}"),
            "--memory",
            "size=512M",
            "--blk",
            &drive,
            "--kernel",
            kernel.to_str().expect("text"),
            "--initramfs",
            archive.to_str().expect("text"),
            "--cmdline",
            "console=ttyS0 panic=-1",
        ];
        let mut run = Run::new(&alioth, &format!("normal-{vcpus}"), "intel", &arguments);
        let (console, succeeded) = run.ends();
        assert!(succeeded, "{console}");
        let online = format!("CPUs online: {online}");
        for text in [&online, DISK, "hello from user space"] {
            assert!(console.contains(text), "no `{text}`: {console}");
        }
    }
    // It is in a folder for what tests leave.
    let _ = std::fs::remove_file(disk);
}
