//! QEMU, unmodified, under the preloaded library. `KVM_OPS_QEMU` names the directory with Debian's packages
//! qemu-system-x86, seabios and ovmf, unpacked with what they depend on; without it the tests say that they are skipped.
//! `KVM_OPS_LINUX` and `KVM_OPS_INITRD` name a kernel that can be a TDX guest, and an archive whose `init` writes which
//! processors are online, the first line of `/dev/vda`, and "hello from user space", and switches the machine off.

#[path = "common/named.rs"]
mod named;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use named::named;

/// A guest that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(600);

/// QEMU on an Intel machine whose TDX module takes its CPUID.
fn intel(folder: &Path) -> Command {
    let mut command = qemu(folder);
    command
        .args(["-cpu", "host,family=6,model=143,stepping=8"])
        .env("KVM_OPS_WITH", "intel");
    command
}

/// QEMU on an AMD machine, with a guest of SEV.
fn amd(folder: &Path, guest: &str) -> Command {
    let mut command = qemu(folder);
    command
        .args(["-cpu", "EPYC-v4", "-m", "512", "-object", guest])
        .args(["-machine", "q35,confidential-guest-support=sev0"])
        .env("KVM_OPS_WITH", "amd");
    command
}

/// The C-bit of the software AMD SP, and the bits of physical addresses that encryption takes.
const C_BIT: &str = "cbitpos=51,reduced-phys-bits=1";

/// QEMU, started by its own loader, with the guest's serial port as its output.
fn qemu(folder: &Path) -> Command {
    let own = std::env::current_exe().expect("a path");
    let mut command = Command::new(folder.join("lib64/ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(folder.join("usr/lib/x86_64-linux-gnu"))
        .arg(folder.join("usr/bin/qemu-system-x86_64"))
        .arg("-L")
        .arg(folder.join("usr/share/qemu"))
        .arg("-L")
        .arg(folder.join("usr/share/seabios"))
        .args(["-accel", "kvm", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-serial", "stdio", "-no-reboot"])
        .env("LD_PRELOAD", own.with_file_name("libkvm_ops_preload.so"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

const TD: [&str; 4] = [
    "-machine",
    "q35,kernel-irqchip=split,confidential-guest-support=tdx0",
    "-object",
    "tdx-guest,id=tdx0",
];

/// What the child writes, piece by piece.
fn pieces(child: &mut Child) -> Receiver<Vec<u8>> {
    let mut output = child.stdout.take().expect("a pipe");
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = output.read(&mut bytes) {
            if sender.send(bytes[..len].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Waits for a text on the serial port, and ends QEMU.
fn writes(command: &mut Command, text: &str) {
    let mut child = command.spawn().expect("QEMU");
    let (output, started) = (pieces(&mut child), Instant::now());
    let mut all = Vec::new();
    while !String::from_utf8_lossy(&all).contains(text) {
        let left = LIMIT.saturating_sub(started.elapsed());
        match output.recv_timeout(left) {
            Ok(piece) => all.extend(piece),
            Err(_) => break,
        }
    }
    // It may have ended.
    let _ = child.kill();
    let _ = child.wait();
    let all = String::from_utf8_lossy(&all);
    assert!(all.contains(text), "{all}");
}

/// The first line of the guest's disk.
const DISK: &str = "a disk of kvm-ops";

/// Linux with one vCPU and with two, and a disk, comes to user space and switches the machine off.
fn boots_linux(qemu: impl Fn() -> Command) {
    let (Some(kernel), Some(archive)) = (named("KVM_OPS_LINUX"), named("KVM_OPS_INITRD")) else {
        return;
    };
    for (vcpus, online) in [("1", "0"), ("2", "0-1")] {
        let disk = disk();
        let drive = format!("format=raw,if=none,id=disk,file={}", disk.display());
        let mut command = qemu();
        command
            .args(["-m", "512", "-smp", vcpus, "-drive", &drive])
            .args(["-device", "virtio-blk-pci,drive=disk"])
            .args(["-append", "console=ttyS0 panic=-1", "-kernel"])
            .arg(&kernel)
            .arg("-initrd")
            .arg(&archive);
        let output = command.output().expect("QEMU");
        // The disk may be gone already.
        let _ = std::fs::remove_file(disk);
        let all = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}: {all}", output.status);
        let online = format!("CPUs online: {online}\r\n");
        for text in [&online, DISK, "hello from user space"] {
            assert!(all.contains(text), "no `{text}`: {all}");
        }
    }
}

/// A new disk of 1 MiB, of which nobody else has the file.
fn disk() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "disk-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut bytes = format!("{DISK}\n").into_bytes();
    bytes.resize(1 << 20, 0);
    std::fs::write(&path, bytes).expect("a disk");
    path
}

#[test]
fn seabios_looks_for_something_to_boot() {
    let Some(folder) = named("KVM_OPS_QEMU") else {
        return;
    };
    let mut command = intel(&folder);
    command.args(["-machine", "q35,graphics=off", "-m", "128"]);
    writes(&mut command, "No bootable device");
}

/// The guest reads the board's clock, looks for something to boot, and resets the machine, which ends QEMU.
#[test]
fn seabios_is_served_from_its_record_to_the_end_of_qemu() {
    let Some(folder) = named("KVM_OPS_QEMU") else {
        return;
    };
    let name = format!("seabios-{}.txt", std::process::id());
    let record = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let run = |variable| {
        let mut command = intel(&folder);
        command
            .args(["-machine", "q35,graphics=off", "-m", "32"])
            .args(["-boot", "reboot-timeout=1"])
            .env(variable, &record);
        let output = command.stderr(Stdio::piped()).output().expect("QEMU");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {errors}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let first = run("KVM_OPS_RECORD");
    assert!(first.contains("No bootable device"), "{first}");
    for _ in 0..3 {
        assert_eq!(first, run("KVM_OPS_REPLAY"));
    }
    let _ = std::fs::remove_file(record);
}

#[test]
fn tdvf_reaches_its_boot_manager() {
    let Some(folder) = named("KVM_OPS_QEMU") else {
        return;
    };
    let mut command = intel(&folder);
    let firmware = folder.join("usr/share/ovmf/OVMF.inteltdx.ms.fd");
    command.args(TD).args(["-m", "512", "-bios"]).arg(firmware);
    writes(
        &mut command,
        "BdsDxe: Press any key to enter the Boot Manager Menu",
    );
}

/// SEV by policy 1 and SEV-ES by policy 5.
#[test]
fn firmware_of_sev_and_sev_es_guests_reaches_its_boot_manager() {
    let Some(folder) = named("KVM_OPS_QEMU") else {
        return;
    };
    for policy in [1, 5] {
        let guest = format!("sev-guest,id=sev0,policy={policy},{C_BIT}");
        let mut command = amd(&folder, &guest);
        command
            .arg("-bios")
            .arg(folder.join("usr/share/ovmf/OVMF.fd"));
        writes(
            &mut command,
            "BdsDxe: Press any key to enter the Boot Manager Menu",
        );
    }
}

#[test]
fn firmware_of_an_snp_guest_looks_for_something_to_boot() {
    let Some(folder) = named("KVM_OPS_QEMU") else {
        return;
    };
    let mut command = snp(&folder, "");
    writes(&mut command, "BdsDxe: No bootable option was found");
}

/// An SNP guest with the firmware that measures its kernel.
fn snp(folder: &Path, more: &str) -> Command {
    let guest = format!("sev-snp-guest,id=sev0,policy=0x30000,{C_BIT}{more}");
    let mut command = amd(folder, &guest);
    command
        .args([
            "-object",
            "memory-backend-memfd,id=ram1,size=512M,share=true",
        ])
        .args(["-machine", "memory-backend=ram1", "-bios"])
        .arg(folder.join("usr/share/ovmf/OVMF.amdsev.fd"));
    command
}

#[test]
fn linux_boots_in_an_snp_guest_and_switches_off() {
    let Some(folder) = named("KVM_OPS_QEMU") else {
        return;
    };
    boots_linux(|| snp(&folder, ",kernel-hashes=on"));
}

#[test]
fn linux_boots_and_switches_off() {
    let Some(folder) = named("KVM_OPS_QEMU") else {
        return;
    };
    boots_linux(|| {
        let mut command = intel(&folder);
        command.args(["-machine", "q35,graphics=off"]);
        command
    });
}

#[test]
fn linux_boots_in_a_td_and_switches_off() {
    let Some(folder) = named("KVM_OPS_QEMU") else {
        return;
    };
    let firmware = folder.join("usr/share/ovmf/OVMF.fd");
    boots_linux(|| {
        let mut command = intel(&folder);
        command.args(TD).arg("-bios").arg(&firmware);
        command
    });
}
