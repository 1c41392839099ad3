//! A driver, of the disk above all, by the exits that a guest's accesses make.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

use kvm_ops::{Exit, Gfn, Gpa, Irqchip, Msi, VcpuId};
use tempfile::NamedTempFile;

use crate::devices::q35::virtio::{Disk, DiskCounts};
use crate::{
    ConsoleSink, DeviceMemory, ExitContext, ExitHandler, Flow, GuestRam, Inside, Q35, SharedFrames,
};

/// Memory of the machine, and where the driver puts the device's.
pub(super) const RAM: u64 = 1 << 20;
pub(super) const BAR: u32 = 0xc010_0000;
/// The rings, and the indirect table.
pub(super) const DESCRIPTORS: u64 = 0x1_0000;
pub(super) const AVAILABLE: u64 = 0x1_1000;
pub(super) const USED: u64 = 0x1_2000;
pub(super) const TABLE: u64 = 0x1_3000;
/// From a queue's rings to those of the next one.
pub(super) const QUEUE_STEP: u64 = 0x4000;
/// The parts of a request.
pub(super) const HEADER: u64 = 0x2_0000;
pub(super) const DATA: u64 = 0x2_1000;
pub(super) const STATUS: u64 = 0x3_0000;
pub(super) const SIZE: u16 = 16;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Features: those of the device's kind, and the transport's.
pub(super) const RO: u64 = 1 << 5;
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const ACCESS_PLATFORM: u64 = 1 << 33;
pub(super) const NEEDS_RESET: u8 = 64;

pub(super) const SECTORS: u64 = 64;

/// A disk image of which each sector's bytes are its number.
pub(super) fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[sector as u8; 512]).unwrap();
    }
    file
}

/// A machine that keeps pages private, and what its devices send.
pub(super) struct Board {
    ram: GuestRam,
    pub(super) private: Mutex<BTreeSet<u64>>,
    pub(super) messages: Mutex<Vec<Msi>>,
    pub(super) lines: Mutex<Vec<(u32, bool)>>,
}

impl SharedFrames for Board {
    fn is_shared(&self, gfn: Gfn) -> bool {
        !self.private.lock().unwrap().contains(&gfn.get())
    }
}

impl Inside for Board {
    fn memory(&self) -> DeviceMemory<'_> {
        DeviceMemory::with_private(&self.ram, self)
    }

    fn signal_msi(&self, msi: Msi) -> kvm_ops::Result<bool> {
        self.messages.lock().unwrap().push(msi);
        Ok(true)
    }

    fn set_irq_line(&self, gsi: u32, active: bool) -> kvm_ops::Result<()> {
        self.lines.lock().unwrap().push((gsi, active));
        Ok(())
    }
}

/// A descriptor: address, length, flags, next.
pub(super) type Descriptor = (u64, u32, u16, u16);

pub(super) struct Driver {
    q35: Q35,
    pub(super) board: Board,
    /// The structures' places in the device's memory, by their type.
    places: [u32; 5],
    pub(super) msix: u16,
    pub(super) window: u16,
    available: u16,
}

impl Driver {
    /// A machine with that disk, which the driver has found and given memory.
    pub(super) fn new(disk: Disk) -> Self {
        Self::with_irqchip(disk, Irqchip::Full)
    }

    pub(super) fn with_irqchip(disk: Disk, irqchip: Irqchip) -> Self {
        Self::of(irqchip, [0x42, 0x10], |q35| q35.with_disk(disk).unwrap())
    }

    /// A machine with a device of that number.
    pub(super) fn of(irqchip: Irqchip, number: [u8; 2], plug: impl FnOnce(Q35) -> Q35) -> Self {
        let ram = GuestRam::new(RAM, 0, false).unwrap();
        let console = ConsoleSink::discard();
        // The I/O APIC of a full irqchip is the platform's.
        let devices = crate::Devices::new(RAM, 1, console.clone());
        let devices = (irqchip == Irqchip::Full).then_some(devices);
        let q35 = Q35::new(&ram, 1, None, irqchip, console, devices);
        let mut driver = Self {
            q35: plug(q35),
            board: Board {
                ram,
                private: Mutex::default(),
                messages: Mutex::default(),
                lines: Mutex::default(),
            },
            places: [0; 5],
            msix: 0,
            window: 0,
            available: 0,
        };
        driver.find(number);
        driver
    }

    pub(super) fn counts(&self) -> DiskCounts {
        self.q35.disk_counts()[0]
    }

    fn exit(&self, exit: Exit, data: &mut [u8]) {
        let mut context = ExitContext::new(VcpuId(0), exit, data, &self.board);
        assert_eq!(self.q35.handle(&mut context), Flow::Continue);
    }

    fn out(&self, port: u16, data: &[u8]) {
        let size = data.len() as u8;
        let exit = Exit::IoOut {
            port,
            size,
            count: 1,
        };
        self.exit(exit, &mut data.to_vec());
    }

    fn select(&self, at: u16) {
        let address = 0x8000_0800 | u32::from(at & 0xfc);
        self.out(0xcf8, &address.to_le_bytes());
    }

    /// Reads configuration space, by ports.
    pub(super) fn config<const N: usize>(&self, at: u16) -> [u8; N] {
        self.select(at);
        let mut data = [0x5a; N];
        let exit = Exit::IoIn {
            port: 0xcfc + at % 4,
            size: N as u8,
            count: 1,
        };
        self.exit(exit, &mut data);
        data
    }

    pub(super) fn set_config(&self, at: u16, data: &[u8]) {
        self.select(at);
        self.out(0xcfc + at % 4, data);
    }

    /// Reads memory of the device.
    pub(super) fn get<const N: usize>(&self, offset: u32) -> [u8; N] {
        let gpa = Gpa::new((BAR + offset).into());
        let mut data = [0x5a; N];
        self.exit(Exit::MmioRead { gpa, len: N as u8 }, &mut data);
        data
    }

    pub(super) fn set(&self, offset: u32, data: &[u8]) {
        let gpa = Gpa::new((BAR + offset).into());
        let len = data.len() as u8;
        self.exit(Exit::MmioWrite { gpa, len }, &mut data.to_vec());
    }

    /// Sets a register of the machine's I/O APIC.
    pub(super) fn set_ioapic(&self, register: u32, value: u32) {
        for (offset, value) in [(0, register), (0x10, value)] {
            let gpa = Gpa::new(0xfec0_0000 + offset);
            self.exit(Exit::MmioWrite { gpa, len: 4 }, &mut value.to_le_bytes());
        }
    }

    /// Gives the device memory, and learns where its structures are.
    fn find(&mut self, number: [u8; 2]) {
        assert_eq!(self.config(0), [0xf4, 0x1a]);
        assert_eq!(self.config(2), number);
        self.set_config(0x10, &[0xff; 4]);
        assert_eq!(u32::from_le_bytes(self.config(0x10)), 0xffff_8000);
        self.set_config(0x10, &BAR.to_le_bytes());
        self.set_config(4, &[6, 0]);
        let [mut at] = self.config(0x34);
        while at != 0 {
            let [id, next] = self.config(at.into());
            match id {
                0x11 => self.msix = at.into(),
                9 => {
                    let [kind, bar] = self.config(u16::from(at) + 3);
                    assert_eq!(bar, 0);
                    match self.places.get_mut(usize::from(kind)) {
                        Some(_) => {
                            let offset = u32::from_le_bytes(self.config(u16::from(at) + 8));
                            self.places[usize::from(kind)] = offset;
                        }
                        None => self.window = at.into(),
                    }
                }
                other => panic!("capability {other:#x}"),
            }
            at = next;
        }
    }

    pub(super) const fn common(&self, at: u32) -> u32 {
        self.places[1] + at
    }

    pub(super) const fn notify_at(&self) -> u32 {
        self.places[2]
    }

    pub(super) const fn isr(&self) -> u32 {
        self.places[3]
    }

    pub(super) const fn device_config(&self) -> u32 {
        self.places[4]
    }

    pub(super) fn status(&self) -> u8 {
        self.get::<1>(self.common(0x14))[0]
    }

    pub(super) fn set_status(&self, status: u8) {
        self.set(self.common(0x14), &[status]);
    }

    pub(super) fn offered(&self) -> u64 {
        let half = |which: u32| {
            self.set(self.common(0), &which.to_le_bytes());
            u64::from(u32::from_le_bytes(self.get(self.common(4))))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device, and negotiates these features; false if the device refuses them.
    pub(super) fn negotiate(&mut self, features: u64) -> bool {
        self.available = 0;
        for status in [0, 1, 3] {
            self.set_status(status);
        }
        for (which, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            self.set(self.common(8), &which.to_le_bytes());
            self.set(self.common(0xc), &half.to_le_bytes());
        }
        self.set_status(0xb);
        self.status() & 8 != 0
    }

    /// Sets the queue up, and goes live.
    pub(super) fn begin(&mut self) {
        self.begin_with(1);
    }

    /// Sets that many queues up, and goes live.
    pub(super) fn begin_with(&mut self, queues: u16) {
        assert!(self.negotiate(VERSION_1 | ACCESS_PLATFORM));
        for queue in 0..queues {
            let step = u64::from(queue) * QUEUE_STEP;
            self.write(AVAILABLE + step, &[0; 4]);
            self.write(USED + step, &[0; 4]);
            self.set(self.common(0x16), &queue.to_le_bytes());
            self.set(self.common(0x18), &SIZE.to_le_bytes());
            for (at, gpa) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
                self.set(self.common(at), &(gpa + step).to_le_bytes());
            }
            self.set(self.common(0x1c), &[1, 0]);
        }
        self.set_status(0xf);
    }

    /// The machine's devices.
    pub(super) const fn q35(&self) -> &Q35 {
        &self.q35
    }

    pub(super) fn write(&self, gpa: u64, data: &[u8]) {
        self.board.ram.write(Gpa::new(gpa), data).unwrap();
    }

    pub(super) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut data = [0; N];
        self.board.ram.read(Gpa::new(gpa), &mut data).unwrap();
        data
    }

    pub(super) fn put_descriptors(&self, table: u64, list: &[Descriptor]) {
        for ((address, len, flags, next), at) in list.iter().zip((table..).step_by(16)) {
            self.write(at, &address.to_le_bytes());
            self.write(at + 8, &len.to_le_bytes());
            self.write(at + 12, &flags.to_le_bytes());
            self.write(at + 14, &next.to_le_bytes());
        }
    }

    /// Puts the header of a request.
    pub(super) fn put_header(&self, kind: u32, sector: u64) {
        self.write(HEADER, &kind.to_le_bytes());
        self.write(HEADER + 4, &[0; 4]);
        self.write(HEADER + 8, &sector.to_le_bytes());
        self.write(STATUS, &[0xee]);
    }

    /// Makes a chain available, and notifies the device.
    pub(super) fn offer(&mut self, head: u16) {
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.write(entry, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.available.to_le_bytes());
        self.notify();
    }

    pub(super) fn notify(&self) {
        self.set(self.notify_at(), &[0, 0]);
    }

    pub(super) fn used(&self) -> u16 {
        u16::from_le_bytes(self.read(USED + 2))
    }

    /// Does a request whose data the device reads, or writes. Returns its status, and the length that the device told.
    pub(super) fn request(&mut self, kind: u32, sector: u64, len: u32, writes: bool) -> (u8, u32) {
        self.put_header(kind, sector);
        let flags = NEXT | if writes { WRITE } else { 0 };
        self.put_descriptors(
            DESCRIPTORS,
            &[
                (HEADER, 16, NEXT, 1),
                (DATA, len, flags, 2),
                (STATUS, 1, WRITE, 0),
            ],
        );
        let before = self.used();
        self.offer(0);
        assert_eq!(self.used(), before.wrapping_add(1), "{:#x}", self.status());
        let entry = USED + 4 + 8 * u64::from(before % SIZE);
        assert_eq!(self.read(entry), [0; 4]);
        (
            self.read::<1>(STATUS)[0],
            u32::from_le_bytes(self.read(entry + 4)),
        )
    }
}
