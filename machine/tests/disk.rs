//! The Q35's disk in every kind of VM of the software platform: a guest program finds it in configuration space, gives it
//! memory and a message, and reads and writes sectors by memory that it shares.

#[path = "virtio/linear.rs"]
mod linear;
mod support;

use std::io::Write;

use kvm_ops::sim::SimHost;
use kvm_ops::{Gpa, Irqchip, Kind, Tech, Vendor};
use kvm_ops_machine::{ConsoleSink, Disk, DiskCounts, End, Machine, MachineConfig};
use linear::{Cpu, Linear};
use support::{every_kind, limits};
use tempfile::NamedTempFile;

/// The configuration space of the first slot, and where the guest puts the device's memory.
const WINDOW: u32 = 0xe000_0000;
const SLOT: u64 = WINDOW as u64 + (8 << 12);
const MEMORY: u64 = 0xc000_0000;
const VECTOR: u8 = 0x25;

/// Pages that the guest shares: rings, header and status, data.
const RINGS: u64 = 0x10_0000;
const AVAILABLE: u64 = RINGS + 0x400;
const USED: u64 = RINGS + 0x800;
const REQUEST: u64 = 0x10_1000;
const STATUS: u64 = REQUEST + 16;
const DATA: u64 = 0x10_2000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const READ_SECTORS: u32 = 0;
const WRITE_SECTORS: u32 = 1;
const NEEDS_RESET: u8 = 64;

fn get<const N: usize>(cpu: &Cpu, at: u64) -> Option<[u8; N]> {
    cpu.read(cpu.shared(Gpa::new(at)), N)?.try_into().ok()
}

fn put(cpu: &Cpu, at: u64, data: &[u8]) -> Option<()> {
    cpu.write(cpu.shared(Gpa::new(at)), data)
}

/// A device with memory and a message for its queue, which is set up.
struct Driver<'a> {
    cpu: &'a Cpu,
    common: u64,
    notify: u64,
    offered: u16,
}

impl<'a> Driver<'a> {
    fn begin(cpu: &'a Cpu) -> Option<Self> {
        cpu.share(Gpa::new(RINGS), 2)?;
        // PCIEXBAR of the memory controller.
        cpu.out(0xcf8, &0x8000_0060_u32.to_le_bytes())?;
        cpu.out(0xcfc, &(WINDOW | 1).to_le_bytes())?;
        (get(cpu, SLOT)? == [0xf4, 0x1a, 0x42, 0x10]).then_some(())?;
        put(cpu, SLOT + 0x10, &(MEMORY as u32).to_le_bytes())?;
        put(cpu, SLOT + 4, &[6, 0])?;
        let (mut common, mut notify) = (None, None);
        let [mut at] = get(cpu, SLOT + 0x34)?;
        while at != 0 {
            let capability = SLOT + u64::from(at);
            let [id, next, _, kind] = get(cpu, capability)?;
            let place = MEMORY + u64::from(u32::from_le_bytes(get(cpu, capability + 8)?));
            match (id, kind) {
                (9, 1) => common = Some(place),
                (9, 2) => notify = Some(place),
                (0x11, _) => {
                    let table = u32::from_le_bytes(get(cpu, capability + 4)?);
                    let entry = MEMORY + u64::from(table) + 16;
                    for (at, word) in [(0, 0xfee0_0000), (4, 0), (8, VECTOR.into()), (12, 0_u32)] {
                        put(cpu, entry + at, &word.to_le_bytes())?;
                    }
                    put(cpu, capability + 2, &[1, 0x80])?;
                }
                _ => {}
            }
            at = next;
        }
        let driver = Self {
            cpu,
            common: common?,
            notify: notify?,
            offered: 0,
        };
        driver.negotiate()?;
        Some(driver)
    }

    fn set(&self, at: u64, data: &[u8]) -> Option<()> {
        put(self.cpu, self.common + at, data)
    }

    fn status(&self) -> Option<u8> {
        get::<1>(self.cpu, self.common + 0x14).map(|[status]| status)
    }

    fn negotiate(&self) -> Option<()> {
        for status in [0, 1, 3] {
            self.set(0x14, &[status])?;
        }
        // VERSION_1 and ACCESS_PLATFORM, and nothing of the first half.
        for (half, features) in [(0_u32, 0_u32), (1, 3)] {
            self.set(0x08, &half.to_le_bytes())?;
            self.set(0x0c, &features.to_le_bytes())?;
        }
        self.set(0x14, &[0xb])?;
        (self.status()? == 0xb).then_some(())?;
        put(self.cpu, AVAILABLE, &[0; 4])?;
        put(self.cpu, USED, &[0; 4])?;
        self.set(0x16, &[0, 0])?;
        self.set(0x18, &[4, 0])?;
        self.set(0x1a, &[1, 0])?;
        for (at, gpa) in [(0x20, RINGS), (0x28, AVAILABLE), (0x30, USED)] {
            self.set(at, &(gpa as u32).to_le_bytes())?;
            self.set(at + 4, &[0; 4])?;
        }
        self.set(0x1c, &[1, 0])?;
        self.set(0x14, &[0xf])
    }

    /// Asks for a sector to be read or written, and waits for the interrupt. Returns the status of the request.
    fn request(&mut self, kind: u32, sector: u64) -> Option<u8> {
        let mut header = [0; 17];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        header[16] = 0xee;
        put(self.cpu, REQUEST, &header)?;
        let writes = if kind == READ_SECTORS { WRITE } else { 0 };
        let chain = [
            (REQUEST, 16_u32, NEXT, 1_u16),
            (DATA, 512, NEXT | writes, 2),
            (STATUS, 1, WRITE, 0),
        ];
        for ((gpa, len, flags, next), at) in chain.into_iter().zip((RINGS..).step_by(16)) {
            put(self.cpu, at, &gpa.to_le_bytes())?;
            put(self.cpu, at + 8, &len.to_le_bytes())?;
            put(self.cpu, at + 12, &flags.to_le_bytes())?;
            put(self.cpu, at + 14, &next.to_le_bytes())?;
        }
        let entry = AVAILABLE + 4 + 2 * u64::from(self.offered % 4);
        put(self.cpu, entry, &[0, 0])?;
        self.offered += 1;
        put(self.cpu, AVAILABLE + 2, &self.offered.to_le_bytes())?;
        put(self.cpu, self.notify, &[0, 0])?;
        Some(get::<1>(self.cpu, STATUS)?[0])
    }
}

/// Copies sector 1 to sector 2, reversed, and prints what it read.
fn copy(cpu: &Cpu) -> Option<()> {
    let mut driver = Driver::begin(cpu)?;
    cpu.share(Gpa::new(DATA), 1)?;
    (driver.request(READ_SECTORS, 1)? == 0).then_some(())?;
    (cpu.halt()? == VECTOR).then_some(())?;
    let mut data: [u8; 512] = get(cpu, DATA)?;
    cpu.print(&data[..5])?;
    data.reverse();
    put(cpu, DATA, &data)?;
    (driver.request(WRITE_SECTORS, 2)? == 0).then_some(())?;
    (cpu.halt()? == VECTOR).then_some(())
}

/// Has the device read into memory that the guest keeps private, and prints the device's status.
fn keep_private(cpu: &Cpu) -> Option<()> {
    let mut driver = Driver::begin(cpu)?;
    let status = driver.request(READ_SECTORS, 1)?;
    cpu.print(&[status, driver.status()?])
}

/// Runs a guest program with the disk. Returns what it printed, the image, and what it did with the disk.
fn ran(vendor: Vendor, kind: Kind, code: fn(&Cpu) -> Option<()>) -> (Vec<u8>, Vec<u8>, DiskCounts) {
    let mut image = NamedTempFile::new().unwrap();
    image.write_all(&[0; 4 * 512]).unwrap();
    let file = image.as_file();
    std::os::unix::fs::FileExt::write_all_at(file, b"first", 512).unwrap();
    let config = MachineConfig::new()
        .kind(kind)
        .memory(16 << 20)
        .irqchip(Irqchip::Split)
        .program(Linear::new(code));
    let mut machine = Machine::build(&SimHost::new(vendor), config).unwrap();
    let console = ConsoleSink::capture();
    let disk = Disk::open(image.path()).unwrap();
    let q35 = machine.q35(console.clone()).with_disk(disk).unwrap();
    let report = machine.run(&q35, limits()).unwrap();
    assert_eq!(report.end, End::Shutdown, "{kind:?}: {}", console.text());
    assert!(machine.destroy().is_clean());
    let counts = q35.disk_counts()[0];
    drop(q35);
    let bytes = std::fs::read(image.path()).unwrap();
    (console.captured(), bytes, counts)
}

#[test]
fn sectors_are_read_and_written_in_every_kind_of_vm() {
    for (vendor, kind) in every_kind() {
        let (printed, image, counts) = ran(vendor, kind, copy);
        assert_eq!(printed, b"first", "{kind:?}");
        assert_eq!(&image[3 * 512 - 5..3 * 512], b"tsrif", "{kind:?}");
        let bytes = (counts.bytes_read, counts.bytes_written);
        assert_eq!((counts.reads, counts.writes, bytes), (1, 1, (512, 512)));
        assert_eq!((counts.failed, counts.private), (0, 0), "{kind:?}");
    }
}

#[test]
fn private_memory_is_refused_counted_and_leaves_the_device_in_need_of_a_reset() {
    for (vendor, tech) in [(Vendor::Intel, Tech::Tdx), (Vendor::Amd, Tech::SevSnp)] {
        let (printed, _, counts) = ran(vendor, Kind::Of(tech), keep_private);
        assert_eq!(printed, [0xee, 0xf | NEEDS_RESET], "{tech}");
        assert_eq!((counts.private, counts.resets_needed), (1, 1), "{tech}");
        assert_eq!(counts.reads, 0, "{tech}");
    }
}

/// Has the device read into memory of which it tells the host nothing, and prints what it finds there without the C-bit.
fn share_silently(cpu: &Cpu) -> Option<()> {
    let mut driver = Driver::begin(cpu)?;
    (driver.request(READ_SECTORS, 1)? == 0).then_some(())?;
    let data: [u8; 5] = get(cpu, DATA)?;
    cpu.print(&data)
}

#[test]
fn without_snp_the_c_bit_alone_shares_memory_with_a_disk() {
    for tech in [Tech::Sev, Tech::SevEs] {
        let (printed, _, counts) = ran(Vendor::Amd, Kind::Of(tech), share_silently);
        assert_eq!(printed, b"first", "{tech}");
        assert_eq!((counts.reads, counts.private), (1, 0), "{tech}");
    }
}
