//! The devices by the exits that a guest makes.

use kvm_ops::Msi;

use super::*;
use crate::DeviceMemory;
use crate::testing::Alone;

fn q35(image: Option<&Image>) -> (Q35, ConsoleSink) {
    let ram = GuestRam::new(4 << 30, 0, false).unwrap();
    let console = ConsoleSink::capture();
    let q35 = Q35::new(&ram, 2, image, Irqchip::Split, console.clone(), None);
    (q35, console)
}

fn handle(q35: &Q35, vcpu: u32, exit: Exit, data: &mut [u8]) -> (Flow, Option<Answer>) {
    let machine = Alone::new();
    let mut context = ExitContext::new(VcpuId(vcpu), exit, data, &machine);
    let flow = q35.handle(&mut context);
    (flow, context.answered())
}

fn out(q35: &Q35, port: u16, data: &[u8]) -> Flow {
    let exit = Exit::IoOut {
        port,
        size: data.len() as u8,
        count: 1,
    };
    handle(q35, 0, exit, &mut data.to_vec()).0
}

fn input<const N: usize>(q35: &Q35, port: u16) -> [u8; N] {
    let mut data = [0x5a; N];
    let exit = Exit::IoIn {
        port,
        size: N as u8,
        count: 1,
    };
    assert_eq!(handle(q35, 0, exit, &mut data).0, Flow::Continue);
    data
}

fn item(q35: &Q35, key: u16, len: usize) -> Vec<u8> {
    assert_eq!(
        out(q35, fw_cfg::SELECTOR, &key.to_le_bytes()),
        Flow::Continue
    );
    (0..len)
        .flat_map(|_| input::<1>(q35, fw_cfg::DATA))
        .collect()
}

#[test]
fn configuration_space_is_the_same_by_ports_and_by_memory() {
    let (q35, _) = q35(None);
    out(&q35, pci::ADDRESS, &0x8000_f800_u32.to_le_bytes());
    assert_eq!(input(&q35, pci::ADDRESS), 0x8000_f800_u32.to_le_bytes());
    assert_eq!(input(&q35, pci::DATA), 0x2918_8086_u32.to_le_bytes());
    for base in [0xe000_0000_u32, 0xb000_0000] {
        open_window(&q35, base);
        let gpa = Gpa::new(u64::from(base) + 0xf_8000);
        let mut data = [0; 4];
        handle(&q35, 0, Exit::MmioRead { gpa, len: 4 }, &mut data);
        assert_eq!(data, 0x2918_8086_u32.to_le_bytes());
    }
}

/// Opens the memory window of the configuration space at an address.
fn open_window(q35: &Q35, base: u32) {
    out(q35, pci::ADDRESS, &0x8000_0060_u32.to_le_bytes());
    out(q35, pci::DATA, &(base | 1).to_le_bytes());
}

#[test]
fn the_acpi_tables_tell_where_firmware_has_put_the_window() {
    let (q35, _) = q35(None);
    let tables = || {
        let directory = item(&q35, 0x19, 4 + 6 * 64);
        let name = b"etc/acpi/tables\0";
        let named = |entry: &&[u8]| entry[8..].starts_with(name);
        let entry = directory[4..].chunks(64).find(named).unwrap();
        let key = u16::from_be_bytes([entry[4], entry[5]]);
        let len = u32::from_be_bytes(entry[..4].try_into().unwrap());
        item(&q35, key, len as usize)
    };
    let space = || {
        let tables = tables();
        let at = tables.windows(4).position(|bytes| bytes == b"MCFG")?;
        Some(u64::from_le_bytes(
            tables[at + 44..][..8].try_into().unwrap(),
        ))
    };
    open_window(&q35, 0xb000_0000);
    // By the window, which moves with it.
    let gpa = Gpa::new(0xb000_0060);
    let exit = Exit::MmioWrite { gpa, len: 4 };
    handle(&q35, 0, exit, &mut 0xe000_0001_u32.to_le_bytes());
    assert_eq!(space(), Some(0xe000_0000));
    // Firmware has read the tables, so they stay.
    open_window(&q35, 0xb000_0000);
    assert_eq!(space(), Some(0xe000_0000));
}

#[test]
fn switching_off_ends_the_machine_and_the_timer_counts() {
    let (q35, _) = q35(None);
    let off = out(&q35, power::PM1A_CONTROL, &0x2000_u16.to_le_bytes());
    assert_eq!(off, Flow::End(End::PowerOff));
    let first = u32::from_le_bytes(input(&q35, power::TIMER));
    std::thread::sleep(Duration::from_millis(2));
    assert!(u32::from_le_bytes(input(&q35, power::TIMER)) > first);
}

#[test]
fn firmware_finds_memory_and_kernel_in_the_configuration_device() {
    let image = Image::from_bytes("firmware", vec![1; 16])
        .kernel(vec![7; 700])
        .initrd(vec![8; 3])
        .cmdline("quiet");
    let (q35, _) = q35(Some(&image));
    assert_eq!(item(&q35, 0, 4), *b"QEMU");
    assert_eq!(item(&q35, 5, 2), [2, 0]);
    assert_eq!(item(&q35, 8, 4), 700_u32.to_le_bytes());
    assert_eq!(item(&q35, 0x11, 2), [7, 7]);
    assert_eq!(item(&q35, 0x12, 4), [8, 8, 8, 0]);
    assert_eq!(item(&q35, 0x15, 6), *b"quiet\0");
    // The first file is the memory map: 2 GiB below the hole, 2 GiB from 4 GiB on.
    let map = item(&q35, 0x20, 40);
    let number = |at: usize| u64::from_le_bytes(map[at..at + 8].try_into().unwrap());
    assert_eq!([number(0), number(8)], [0, 2 << 30]);
    assert_eq!([number(20), number(28)], [4 << 30, 2 << 30]);
}

#[test]
fn the_devices_of_every_pc_are_there_too() {
    let (q35, console) = q35(None);
    out(&q35, 0x3f8, b"x");
    assert_eq!(console.text(), "x");
    assert_eq!(out(&q35, 0xcf9, &[6]), Flow::End(End::Reset));
    // No keyboard controller.
    for port in [0x80, 0x60, 0x64] {
        assert_eq!(input(&q35, port), [0xff]);
    }
}

#[test]
fn the_apic_base_names_the_processor_that_boots() {
    let (q35, _) = q35(None);
    let read = |vcpu, index| handle(&q35, vcpu, Exit::ReadMsr { index }, &mut []).1;
    assert_eq!(read(0, 0x1b), Some(Answer::Msr(0xfee0_0d00)));
    assert_eq!(read(1, 0x1b), Some(Answer::Msr(0xfee0_0c00)));
    assert_eq!(read(0, 0xce), Some(Answer::Msr(0)));
    let write = Exit::WriteMsr {
        index: 0xce,
        value: 1,
    };
    assert_eq!(handle(&q35, 0, write, &mut []), (Flow::Continue, None));
}

/// Writes the entry of the serial line's input: vector 0x41 of that vCPU.
fn route_serial_line(q35: &Q35, vcpu: u32) {
    for (register, value) in [(0x18_u32, 0x41_u32), (0x19, vcpu << 24)] {
        for (offset, value) in [(0, register), (0x10, value)] {
            let exit = Exit::MmioWrite {
                gpa: Gpa::new(ioapic::BASE + offset),
                len: 4,
            };
            handle(q35, 0, exit, &mut value.to_le_bytes());
        }
    }
}

#[test]
fn the_serial_line_sends_the_message_of_its_input() {
    let (q35, _) = q35(None);
    route_serial_line(&q35, 1);
    let machine = Sent(Alone::new(), Mutex::default());
    // A byte is sent while the transmitter's interrupt is enabled.
    for port in [0x3f9, 0x3f8] {
        let exit = Exit::IoOut {
            port,
            size: 1,
            count: 1,
        };
        let mut data = [2];
        q35.handle(&mut ExitContext::new(VcpuId(0), exit, &mut data, &machine));
    }
    let sent = machine.1.into_inner().unwrap();
    assert!(!sent.is_empty());
    assert!(
        sent.iter().all(|msi| *msi == Msi::to(VcpuId(1), 0x41)),
        "{sent:?}"
    );
}

#[test]
fn keys_interrupt_without_an_exit() {
    let (q35, _) = q35(None);
    route_serial_line(&q35, 0);
    let machine = Sent(Alone::new(), Mutex::default());
    // The driver has the interrupt of received data enabled.
    out(&q35, 0x3f9, &[1]);
    assert_eq!(q35.type_serial(b"ok", &machine), 2);
    let sent = machine.1.into_inner().unwrap();
    assert!(sent.contains(&Msi::to(VcpuId(0), 0x41)), "{sent:?}");
    assert_eq!(
        [input::<1>(&q35, 0x3f8), input(&q35, 0x3f8)],
        [*b"o", *b"k"]
    );
}

/// A machine that keeps the messages that its devices send.
struct Sent(Alone, Mutex<Vec<Msi>>);

impl Inside for Sent {
    fn memory(&self) -> DeviceMemory<'_> {
        self.0.memory()
    }

    fn signal_msi(&self, msi: Msi) -> kvm_ops::Result<bool> {
        self.1.lock().unwrap().push(msi);
        Ok(true)
    }
}

#[test]
fn a_kernel_without_firmware_finds_the_configuration_space_in_memory() {
    let vendor = |image: Option<&Image>| {
        let (q35, _) = q35(image);
        let gpa = Gpa::new(kernel::WINDOW.at);
        let mut data = [0; 4];
        let exit = Exit::MmioRead { gpa, len: 4 };
        assert_eq!(handle(&q35, 0, exit, &mut data).0, Flow::Continue);
        u32::from_le_bytes(data)
    };
    let image = Image::from_bytes("kernel", vec![1; 64]);
    assert_eq!(vendor(None), u32::MAX);
    assert_eq!(vendor(Some(&image)), u32::MAX);
    assert_eq!(vendor(Some(&image.acpi())), 0x29c0_8086);
}
