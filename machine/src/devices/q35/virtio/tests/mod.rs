//! The devices as a driver finds them: the disk here, the console in `console`.

mod console;
mod driver;
mod hostile;

use kvm_ops::{Irqchip, Msi};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};

use super::Disk;
use crate::{MachineError, Q35};
use driver::{
    ACCESS_PLATFORM, AVAILABLE, BAR, DATA, DESCRIPTORS, Driver, HEADER, INDIRECT, NEXT, RO,
    SECTORS, STATUS, TABLE, VERSION_1, WRITE, image,
};

const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

const MESSAGES: [Msi; 2] = [
    Msi {
        address: 0xfee0_1000,
        data: 0x41,
    },
    Msi {
        address: 0xfee0_2000,
        data: 0x42,
    },
];

/// Sets the message of a vector, which is not masked.
fn set_vector(driver: &Driver, vector: u32, message: Msi) {
    let words = [message.address as u32, 0, message.data, 0];
    for (word, at) in words.iter().zip((0x4000 + 16 * vector..).step_by(4)) {
        driver.set(at, &word.to_le_bytes());
    }
}

#[test]
fn features_are_negotiated_and_what_is_not_offered_is_refused() {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    // Segments, block size, flush, indirect descriptors, version 1, platform access.
    let offered = driver.offered();
    assert_eq!(
        offered,
        1 << 2 | 1 << 6 | 1 << 9 | 1 << 28 | VERSION_1 | ACCESS_PLATFORM
    );
    for (features, accepted) in [
        (0, false),
        (1 << 9, false),
        (VERSION_1, true),
        (offered, true),
        (offered | RO, false),
        (VERSION_1 | 1 << 63, false),
    ] {
        assert_eq!(driver.negotiate(features), accepted, "{features:#x}");
    }
    let config: [u8; 24] = driver.get(driver.device_config());
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[20..], 512_u32.to_le_bytes());
    // The second queue is not there; the first has 128 entries at most, and one vector.
    driver.set(driver.common(0x16), &[1, 0]);
    assert_eq!(driver.get(driver.common(0x18)), [0, 0]);
    driver.set(driver.common(0x16), &[0, 0]);
    assert_eq!(driver.get(driver.common(0x18)), 128_u16.to_le_bytes());
    for (vector, kept) in [(1_u16, 1_u16), (2, 0xffff)] {
        driver.set(driver.common(0x1a), &vector.to_le_bytes());
        assert_eq!(driver.get(driver.common(0x1a)), kept.to_le_bytes());
    }
}

#[test]
fn requests_of_each_type_are_done_or_refused() {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    driver.begin();
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 7, 1024, true), (OK, 1025));
    assert_eq!(driver.read::<512>(DATA), [7; 512]);
    assert_eq!(driver.read::<512>(DATA + 512), [8; 512]);
    driver.write(DATA, &[0xab; 512]);
    assert_eq!(
        driver.request(VIRTIO_BLK_T_OUT, SECTORS - 1, 512, false),
        (OK, 1)
    );
    let file = std::fs::read(image.path()).unwrap();
    assert_eq!(file.len() as u64, SECTORS * 512);
    assert_eq!(file[63 * 512..], [0xab; 512]);
    assert_eq!(file[62 * 512..63 * 512], [62; 512]);
    assert_eq!(driver.request(VIRTIO_BLK_T_FLUSH, 0, 0, false), (OK, 1));
    assert_eq!(driver.request(VIRTIO_BLK_T_GET_ID, 0, 20, true), (OK, 21));
    let name = image.path().file_name().unwrap().as_encoded_bytes();
    assert!(
        driver
            .read::<20>(DATA)
            .starts_with(&name[..name.len().min(20)])
    );
    assert_eq!(
        driver.request(VIRTIO_BLK_T_DISCARD, 0, 16, false),
        (UNSUPPORTED, 1)
    );
    assert_eq!(driver.request(0xdead, 0, 512, true), (UNSUPPORTED, 1));
    // Beyond the end, over the end, over the end of numbers, a part of a sector.
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 1024),
        (0, 100),
    ] {
        for (kind, writes) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
            let (status, _) = driver.request(kind, sector, len, writes);
            assert_eq!(status, FAILED, "{sector:#x} {len}");
        }
    }
    let counts = driver.counts();
    assert_eq!((counts.reads, counts.bytes_read), (1, 1024));
    assert_eq!((counts.writes, counts.bytes_written), (1, 512));
    assert_eq!((counts.flushes, counts.failed), (1, 12));
    assert_eq!((counts.private, counts.resets_needed), (0, 0));
    assert_eq!(std::fs::read(image.path()).unwrap(), file);
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let image = image();
    let before = std::fs::read(image.path()).unwrap();
    let mut driver = Driver::new(Disk::open_read_only(image.path()).unwrap());
    assert_ne!(driver.offered() & RO, 0);
    driver.begin();
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 1, 512, true).0, OK);
    assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 1, 512, false).0, FAILED);
    assert_eq!(std::fs::read(image.path()).unwrap(), before);
}

#[test]
fn a_request_may_lie_in_an_indirect_table_and_be_cut_anywhere() {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    driver.begin();
    driver.put_header(VIRTIO_BLK_T_IN, 3);
    driver.put_descriptors(
        TABLE,
        &[
            (HEADER, 5, NEXT, 2),
            (DATA + 100, 413, NEXT | WRITE, 3),
            (HEADER + 5, 11, NEXT, 4),
            (STATUS, 1, WRITE, 0),
            (DATA, 100, NEXT | WRITE, 1),
        ],
    );
    // The status is the last byte of what the device writes.
    driver.put_descriptors(DESCRIPTORS, &[(TABLE, 5 * 16, INDIRECT, 0)]);
    driver.offer(0);
    assert_eq!(driver.used(), 1);
    // 513 bytes of room for data are no whole sector.
    assert_eq!(driver.read::<1>(STATUS), [FAILED]);
    driver.write(TABLE + 16 + 8, &412_u32.to_le_bytes());
    driver.offer(0);
    assert_eq!((driver.used(), driver.read::<1>(STATUS)), (2, [OK]));
    assert_eq!(driver.read::<512>(DATA), [3; 512]);
}

#[test]
fn messages_tell_of_used_buffers_and_masked_ones_wait() {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    driver.begin();
    for (vector, message) in (0..).zip(MESSAGES) {
        set_vector(&driver, vector, message);
    }
    driver.set(driver.common(0x10), &[0, 0]);
    driver.set(driver.common(0x1a), &[1, 0]);
    driver.set_config(driver.msix + 2, &[0, 0x80]);
    driver.request(VIRTIO_BLK_T_IN, 0, 512, true);
    assert_eq!(*driver.board.messages.lock().unwrap(), [MESSAGES[1]]);
    assert_eq!(driver.get(driver.isr()), [0]);
    // Masked as a whole: pending until the mask goes.
    driver.set_config(driver.msix + 2, &[0, 0xc0]);
    driver.request(VIRTIO_BLK_T_IN, 0, 512, true);
    assert_eq!(
        (
            driver.board.messages.lock().unwrap().len(),
            driver.get(0x5000)
        ),
        (1, [2])
    );
    driver.set_config(driver.msix + 2, &[0, 0x80]);
    assert_eq!(
        (
            driver.board.messages.lock().unwrap().len(),
            driver.get(0x5000)
        ),
        (2, [0])
    );
    // A driver that polls.
    driver.write(AVAILABLE, &[1, 0]);
    driver.request(VIRTIO_BLK_T_IN, 0, 512, true);
    assert_eq!(driver.board.messages.lock().unwrap().len(), 2);
    assert_eq!(*driver.board.lines.lock().unwrap(), []);
}

#[test]
fn without_messages_the_line_of_the_slot_is_up_until_the_status_is_read() {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    driver.begin();
    driver.request(VIRTIO_BLK_T_IN, 0, 512, true);
    driver.request(VIRTIO_BLK_T_IN, 0, 512, true);
    assert_eq!(*driver.board.lines.lock().unwrap(), [(16, true)]);
    // Interrupt status in the status register.
    assert_eq!(driver.config::<1>(6)[0] & 8, 8);
    assert_eq!(driver.get(driver.isr()), [1]);
    assert_eq!(driver.get(driver.isr()), [0]);
    assert_eq!(
        *driver.board.lines.lock().unwrap(),
        [(16, true), (16, false)]
    );
    // Switched off in the command register, a pending interrupt keeps the line down.
    driver.set_config(4, &[6, 4]);
    driver.request(VIRTIO_BLK_T_IN, 0, 512, true);
    assert_eq!(driver.board.lines.lock().unwrap().len(), 2);
    driver.set_config(4, &[6, 0]);
    assert_eq!(driver.board.lines.lock().unwrap().last(), Some(&(16, true)));
    driver.negotiate(0);
    assert_eq!(
        driver.board.lines.lock().unwrap().last(),
        Some(&(16, false))
    );
    assert_eq!(*driver.board.messages.lock().unwrap(), []);
}

#[test]
fn where_the_machine_has_the_io_apic_the_line_sends_the_message_of_its_input() {
    let image = image();
    let disk = Disk::open(image.path()).unwrap();
    let mut driver = Driver::with_irqchip(disk, Irqchip::Split);
    for (register, value) in [(0x10 + 2 * 16, 0x51_u32), (0x11 + 2 * 16, 3 << 24)] {
        driver.set_ioapic(register, value);
    }
    driver.begin();
    driver.request(VIRTIO_BLK_T_IN, 0, 512, true);
    let message = Msi::to(kvm_ops::VcpuId(3), 0x51);
    assert_eq!(*driver.board.messages.lock().unwrap(), [message]);
}

#[test]
fn the_window_in_configuration_space_shows_the_same_registers() {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    driver.begin();
    let through = |offset: u32, len: u32| {
        driver.set_config(driver.window + 8, &offset.to_le_bytes());
        driver.set_config(driver.window + 12, &len.to_le_bytes());
    };
    through(driver.common(0x14), 1);
    assert_eq!(driver.config(driver.window + 16), [0xf]);
    through(driver.device_config(), 4);
    assert_eq!(
        driver.config(driver.window + 16),
        (SECTORS as u32).to_le_bytes()
    );
    // Of another width than stated it is not an access to the device.
    through(driver.common(0x14), 1);
    driver.set_config(driver.window + 16, &[0, 0]);
    assert_eq!(driver.status(), 0xf);
    driver.set_config(driver.window + 16, &[0]);
    assert_eq!(driver.status(), 0);
    // Beyond the memory there is nothing.
    through(0xffff_fffe, 4);
    assert_eq!(driver.config(driver.window + 16), [0; 4]);
}

#[test]
fn the_device_waits_for_its_driver_and_for_leave_to_use_memory() {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    driver.begin();
    driver.set_config(4, &[2, 0]);
    driver.put_header(VIRTIO_BLK_T_IN, 0);
    let chain = [(HEADER, 16, NEXT, 1), (STATUS, 1, WRITE, 0)];
    driver.put_descriptors(DESCRIPTORS, &chain);
    driver.offer(0);
    assert_eq!(driver.used(), 0, "not a bus master");
    driver.set_config(4, &[6, 0]);
    driver.notify();
    assert_eq!(driver.used(), 1);
    // With memory off nothing answers at the address.
    driver.set_config(4, &[4, 0]);
    assert_eq!(driver.get(driver.common(0x14)), [0xff]);
    driver.set_config(4, &[6, 0]);
    // Before DRIVER_OK.
    driver.negotiate(VERSION_1);
    driver.set(driver.common(0x1c), &[1, 0]);
    driver.notify();
    assert_eq!(driver.used(), 1);
}

#[test]
fn the_device_answers_where_firmware_moves_it() {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    driver.begin();
    driver.set_config(0x10, &(BAR + 0x8000).to_le_bytes());
    assert_eq!(driver.get(driver.common(0x14)), [0xff]);
    assert_eq!(driver.get(0x8000 + driver.common(0x14)), [0xf]);
}

#[test]
fn an_image_is_written_by_one_machine_or_read_by_several() {
    let image = image();
    let busy = |disk: Result<Disk, MachineError>| match disk {
        Err(MachineError::Disk { source, .. }) => source.kind() == std::io::ErrorKind::ResourceBusy,
        other => panic!("{other:?}"),
    };
    let writer = Disk::open(image.path()).unwrap();
    assert!(busy(Disk::open(image.path())) && busy(Disk::open_read_only(image.path())));
    drop(writer);
    let _readers = [(); 2].map(|()| Disk::open_read_only(image.path()).unwrap());
    assert!(busy(Disk::open(image.path())));
}

#[test]
fn images_that_are_no_disks_are_refused_with_their_size() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for bytes in [0, 511, 513] {
        file.as_file().set_len(bytes).unwrap();
        let error = Disk::open(file.path()).unwrap_err();
        assert!(
            matches!(error, MachineError::DiskSize { bytes: told, .. } if told == bytes),
            "{error}"
        );
    }
    let error = Disk::open("/").unwrap_err();
    assert!(matches!(error, MachineError::NotAFile { .. }), "{error}");
    let error = Disk::open("/no such file").unwrap_err();
    assert!(matches!(error, MachineError::Disk { .. }), "{error}");
}

#[test]
fn there_are_eight_slots() {
    let ram = crate::GuestRam::new(driver::RAM, 0, false).unwrap();
    let console = crate::ConsoleSink::discard();
    let mut q35 = Q35::new(&ram, 1, None, Irqchip::Split, console, None);
    let images: Vec<_> = (0..9).map(|_| image()).collect();
    for image in &images[..8] {
        q35 = q35.with_disk(Disk::open(image.path()).unwrap()).unwrap();
    }
    let error = q35.with_disk(Disk::open(images[8].path()).unwrap()).err();
    assert!(
        matches!(error, Some(MachineError::Slots { slots: 8 })),
        "{error:?}"
    );
}
