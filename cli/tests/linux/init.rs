//! Programs for `init`.

use crate::program::{Arg, Program, call, open};

/// The text that [`hello`] writes before the release of the kernel that runs it.
pub(crate) const HELLO: &str = "init: user space of Linux ";

/// Commands of reboot(2).
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    Restart = 0x123_4567,
    PowerOff = 0x4321_fedc,
}

/// The offset of the release in what uname(2) tells.
const RELEASE: u64 = 130;

/// Writes `HELLO` and the release that uname(2) tells, and restarts the machine.
pub(crate) fn hello() -> Vec<u8> {
    let mut program = Program::new();
    program.call(call::UNAME, &[Arg::Buffer(0)]);
    program.say(HELLO);
    program.say_buffer(RELEASE);
    program.finish(End::Restart)
}

/// What [`guest`] writes before the list of vCPUs that are online.
pub(crate) const ONLINE: &str = "init: online ";

/// Writes what the kernel tells of its processors, and switches the machine off.
pub(crate) fn guest() -> Vec<u8> {
    let mut program = Program::new();
    tell_processors(&mut program);
    program.finish(End::PowerOff)
}

/// What [`snp_evidence`] writes before the bytes of the two reports and of the certificates.
pub(crate) const SNP_REPORT: &str = "init: report by ioctl ";
pub(crate) const TSM_REPORT: &str = "init: report by configfs ";
pub(crate) const CERTIFICATES: &str = "init: certificates ";

/// Asks the kernel for the guest's report (SNP_GET_REPORT), and for another one with the host's certificates (configfs, "tsm"),
/// and switches the machine off. The modules are loaded first, in that order.
pub(crate) fn snp_evidence(modules: &[String]) -> Vec<u8> {
    /// `_IOWR('S', 0, struct snp_guest_request_ioctl)`: the version of the message, the addresses of `struct snp_report_req` and
    /// `struct snp_report_resp`, and errors.
    const GET_REPORT: u64 = 0xc020_5300;
    const VERSION: u64 = 1;
    const RESPONSE: u64 = 0x1000;
    const REQUEST: u64 = 0x3000;
    // MSG_REPORT_RSP has a status, a length and zeros before the report.
    const HEADER: u64 = 32;
    const LEN: u64 = 1184;
    let mut program = about_to_ask(modules);
    program.put(REQUEST, Arg::Number(VERSION));
    program.put(REQUEST + 8, Arg::Buffer(0));
    program.put(REQUEST + 16, Arg::Buffer(RESPONSE));
    program.open("/dev/sev-guest", open::BOTH);
    program.call(
        call::IOCTL,
        &[Arg::Rbx, Arg::Number(GET_REPORT), Arg::Buffer(REQUEST)],
    );
    program.close();
    program.end_at(RESPONSE + HEADER + LEN);
    program.print_hex(SNP_REPORT, RESPONSE + HEADER);
    let request = ask_tsm(&mut program);
    for (file, title) in [("outblob", TSM_REPORT), ("auxblob", CERTIFICATES)] {
        program.read(&format!("{request}/{file}"), 0x5000);
        program.print_hex(title, 0x5000);
    }
    program.finish(End::PowerOff)
}

/// A program that has loaded modules, in that order, mounted what tells evidence, and filled the first bytes of the memory with
/// [`DATA`].
fn about_to_ask(modules: &[String]) -> Program {
    let mut program = Program::new();
    program.mount("sysfs", "/sys");
    program.mount("devtmpfs", "/dev");
    program.load_modules(modules);
    program.mount("configfs", "/config");
    program.fill(0, DATA[0].into(), DATA.len() as u32);
    program
}

/// Asks for a report or quote about the first bytes of the memory. Returns the directory of the answer.
fn ask_tsm(program: &mut Program) -> &'static str {
    const REQUEST: &str = "/config/tsm/report/init";
    program.call(call::MKDIR, &[Arg::Text(REQUEST), Arg::Number(0o755)]);
    program.open(&format!("{REQUEST}/inblob"), open::WRITE);
    let data = Arg::Number(DATA.len() as u64);
    program.call(call::WRITE, &[Arg::Rbx, Arg::Buffer(0), data]);
    program.close();
    REQUEST
}

/// What [`speaks`] writes.
pub(crate) const BY_VIRTIO: &str = "init: by virtio";

/// Writes a line to /dev/hvc0, and switches the machine off.
pub(crate) fn speaks() -> Vec<u8> {
    let mut program = Program::new();
    program.mount("devtmpfs", "/dev");
    program.open("/dev/hvc0", open::WRITE);
    program.write(&format!("{BY_VIRTIO}\n"));
    program.close();
    program.finish(End::PowerOff)
}

fn tell_processors(program: &mut Program) {
    program.mount("proc", "/proc");
    program.mount("sysfs", "/sys");
    program.cat("/proc/cpuinfo");
    program.say(ONLINE);
    program.cat("/sys/devices/system/cpu/online");
}

/// What [`evidence`] writes before the bytes of the TD's report, of a quote, and of the event log.
pub(crate) const REPORT: &str = "init: report ";
pub(crate) const QUOTE: &str = "init: quote ";
pub(crate) const EVENT_LOG: &str = "init: event log ";

/// What the guest puts into report and quote: so many bytes of that value.
pub(crate) const DATA: [u8; 64] = [0x5a; 64];

/// Asks the kernel for the TD's report (TDX_CMD_GET_REPORT0), for a quote (configfs, "tsm") and for the event log, and
/// switches the machine off. The modules are loaded first, in that order.
pub(crate) fn evidence(modules: &[String]) -> Vec<u8> {
    /// `_IOWR('T', 1, struct tdx_report_req)`: 64 bytes of data, and the report behind them.
    const GET_REPORT: u64 = 0xc440_5401;
    const LEN: u64 = 1024;
    let data = DATA.len() as u64;
    let mut program = about_to_ask(modules);
    program.open("/dev/tdx_guest", open::BOTH);
    program.call(
        call::IOCTL,
        &[Arg::Rbx, Arg::Number(GET_REPORT), Arg::Buffer(0)],
    );
    program.close();
    program.end_at(data + LEN);
    program.print_hex(REPORT, data);
    let request = ask_tsm(&mut program);
    program.read(&format!("{request}/outblob"), 0x1000);
    program.print_hex(QUOTE, 0x1000);
    program.read("/sys/firmware/acpi/tables/data/CCEL", 0x2000);
    // The area behind the log.
    program.trim(0xff, 0x2000);
    program.print_hex(EVENT_LOG, 0x2000);
    program.finish(End::PowerOff)
}

/// The files of a disk: what [`copies`] prints behind [`SAYS`], what it copies, and the copy.
pub(crate) const TEXT: &str = "text.txt";
pub(crate) const SAYS: &str = "init: the disk says ";
pub(crate) const BLOCKS: &str = "blocks.bin";
pub(crate) const COPY: &str = "copy.bin";

/// Loads modules, in that order, mounts the disk, prints a file, copies another, unmounts the disk, and ends the machine.
pub(crate) fn copies(modules: &[String], end: End) -> Vec<u8> {
    let at = |name: &str| format!("/disk/{name}");
    let mut program = Program::new();
    program.mount("devtmpfs", "/dev");
    program.load_modules(modules);
    program.mount_from("/dev/vda", "vfat", "/disk");
    program.say(SAYS);
    program.cat(&at(TEXT));
    program.say("\n");
    program.read(&at(BLOCKS), 0);
    program.save(&at(COPY), 0);
    program.unmount("/disk");
    program.finish(end)
}
