//! Drivers that break the protocol: the device stops until it is reset, and goes on then.

use kvm_ops::Gpa;
use proptest::prelude::*;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::driver::{
    AVAILABLE, DATA, DESCRIPTORS, Descriptor, Driver, HEADER, INDIRECT, NEEDS_RESET, NEXT, RAM,
    SIZE, STATUS, TABLE, USED, WRITE, image,
};
use crate::devices::q35::virtio::Disk;

/// A driver that has begun, and the image.
fn begun() -> (Driver, tempfile::NamedTempFile) {
    let image = image();
    let mut driver = Driver::new(Disk::open(image.path()).unwrap());
    driver.begin();
    (driver, image)
}

/// The device needs a reset, does nothing meanwhile, and is well after one.
#[track_caller]
fn stopped(driver: &mut Driver, why: &str) {
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{why}");
    let used = driver.used();
    driver.notify();
    assert_eq!(driver.used(), used, "{why}");
    driver.begin();
    assert_eq!(
        driver.request(VIRTIO_BLK_T_IN, 9, 512, true),
        (0, 513),
        "{why}"
    );
    assert_eq!(driver.read::<512>(DATA), [9; 512], "{why}");
}

#[test]
fn chains_that_are_no_requests_stop_the_device() {
    let good = (HEADER, 16, NEXT, 1);
    let end = (STATUS, 1, WRITE, 0);
    let cases: [(&str, &[Descriptor]); 13] = [
        ("a loop", &[good, (DATA, 512, NEXT | WRITE, 1)]),
        ("a loop to the head", &[(HEADER, 16, NEXT, 0)]),
        ("a link to nowhere", &[(HEADER, 16, NEXT, SIZE)]),
        (
            "a readable part behind",
            &[(STATUS, 1, WRITE | NEXT, 1), (HEADER, 16, 0, 0)],
        ),
        ("no status", &[(HEADER, 16, 0, 0)]),
        ("no room for the status", &[good, (STATUS, 0, WRITE, 0)]),
        ("a short header", &[(HEADER, 15, NEXT, 1), end]),
        (
            "an address outside",
            &[good, (RAM - 1, 512, NEXT | WRITE, 2), end],
        ),
        (
            "the last address",
            &[good, (u64::MAX, 512, NEXT | WRITE, 2), end],
        ),
        (
            "4 GiB and more",
            &[
                good,
                (0, u32::MAX, NEXT | WRITE, 2),
                (0, u32::MAX, WRITE, 0),
            ],
        ),
        ("a table in a table", &[(DESCRIPTORS, 16, INDIRECT, 0)]),
        ("a part of a table", &[(TABLE, 24, INDIRECT, 0)]),
        ("a table without entries", &[(TABLE, 0, INDIRECT, 0)]),
    ];
    let (mut driver, image) = begun();
    let before = std::fs::read(image.path()).unwrap();
    for (number, (why, chain)) in (1..).zip(cases) {
        driver.put_header(VIRTIO_BLK_T_IN, 0);
        driver.put_descriptors(DESCRIPTORS, chain);
        driver.offer(0);
        assert_eq!(driver.used(), 0, "{why}");
        assert_eq!(driver.read(STATUS), [0xee], "{why}");
        assert_eq!(driver.counts().resets_needed, number, "{why}");
        stopped(&mut driver, why);
        driver.begin();
    }
    assert_eq!(driver.counts().private, 0);
    assert_eq!(std::fs::read(image.path()).unwrap(), before);
}

#[test]
fn rings_that_are_none_stop_the_device() {
    let (mut driver, _image) = begun();
    driver.offer(SIZE);
    stopped(&mut driver, "a head outside of the table");
    driver.begin();
    driver.write(AVAILABLE + 2, &(SIZE + 1).to_le_bytes());
    driver.notify();
    stopped(&mut driver, "more entries than there are");
    for (at, gpa) in [(0x20, RAM), (0x28, RAM - 2), (0x30, !7), (0x28, 0)] {
        driver.begin();
        // Reset, as rings do not change while they are in use.
        driver.set_status(0);
        for (at, gpa) in [
            (0x20, DESCRIPTORS),
            (0x28, AVAILABLE),
            (0x30, USED),
            (at, gpa),
        ] {
            driver.set(driver.common(at), &gpa.to_le_bytes());
        }
        driver.set(driver.common(0x1c), &[1, 0]);
        if driver.status() & NEEDS_RESET == 0 {
            // There is memory at 0, and virtio-queue takes the address for none.
            driver.set_status(0xf);
            driver.notify();
            assert_eq!((at, gpa), (0x28, 0));
        }
        driver.begin();
        assert_eq!(
            driver.request(VIRTIO_BLK_T_IN, 1, 512, true).0,
            0,
            "{gpa:#x}"
        );
    }
}

#[test]
fn addresses_of_a_ring_in_use_do_not_change() {
    let (mut driver, _image) = begun();
    for at in [0x20, 0x28, 0x30] {
        driver.set(driver.common(at), &RAM.to_le_bytes());
    }
    driver.set(driver.common(0x18), &[1, 0]);
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 1, 512, true).0, 0);
}

#[test]
fn private_memory_is_not_used_and_counted() {
    let (mut driver, image) = begun();
    let before = std::fs::read(image.path()).unwrap();
    let parts = [
        ("descriptors", DESCRIPTORS),
        ("available ring", AVAILABLE),
        ("used ring", USED),
        ("table", TABLE),
        ("header", HEADER),
        ("data", DATA),
        ("status", STATUS),
    ];
    let gfn = |gpa| kvm_ops::Gfn::containing(Gpa::new(gpa)).get();
    for (number, (what, gpa)) in (1..).zip(parts) {
        for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
            driver.begin();
            driver.put_header(kind, 0);
            let flags = if kind == VIRTIO_BLK_T_IN { WRITE } else { 0 };
            let list = [
                (HEADER, 16, NEXT, 1),
                (DATA, 512, NEXT | flags, 2),
                (STATUS, 1, WRITE, 0),
            ];
            driver.put_descriptors(TABLE, &list);
            driver.put_descriptors(DESCRIPTORS, &[(TABLE, 48, INDIRECT, 0)]);
            driver.write(DATA, &[0x77; 512]);
            driver.board.private.lock().unwrap().insert(gfn(gpa));
            driver.offer(0);
            assert_eq!(driver.read(STATUS), [0xee], "{what}");
            assert_eq!(driver.read::<512>(DATA), [0x77; 512], "{what}");
            driver.board.private.lock().unwrap().clear();
            stopped(&mut driver, what);
        }
        let counts = driver.counts();
        assert_eq!(
            (counts.private, counts.resets_needed),
            (2 * number, 2 * number),
            "{what}"
        );
    }
    // A ring that is private when it is set up.
    for (number, (what, gpa)) in (15..).zip(&parts[..3]) {
        driver.board.private.lock().unwrap().insert(gfn(*gpa));
        driver.begin();
        driver.board.private.lock().unwrap().clear();
        assert_eq!(driver.counts().private, number, "{what}");
        stopped(&mut driver, what);
    }
    assert_eq!(std::fs::read(image.path()).unwrap(), before);
}

/// A descriptor that is likely to mean something.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        Just(HEADER),
        Just(TABLE),
        Just(DESCRIPTORS),
        Just(STATUS),
        DATA..DATA + 0x2000,
        any::<u64>(),
        RAM - 600..RAM + 10,
    ];
    let len = prop_oneof![
        Just(16_u32),
        Just(512),
        Just(1),
        Just(0),
        0..4096_u32,
        any::<u32>()
    ];
    let flags = prop_oneof![0..8_u16, any::<u16>()];
    (address, len, flags, 0..SIZE + 2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// The device answers a request or needs a reset, whatever the rings hold, and writes no memory but what the
    /// descriptors allow.
    #[test]
    fn nothing_in_the_rings_harms_more_than_the_device(
        list in prop::collection::vec(descriptor(), SIZE as usize),
        table in prop::collection::vec(descriptor(), 4),
        heads in prop::collection::vec(0..SIZE + 1, 1..6),
        kind in prop_oneof![Just(0_u32), Just(1), Just(4), Just(8), any::<u32>()],
        sector in prop_oneof![0..80_u64, any::<u64>()],
        index in prop_oneof![Just(None), any::<u16>().prop_map(Some)],
        private in prop::option::of(0..256_u64),
    ) {
        let (mut driver, image) = begun();
        driver.put_header(kind, sector);
        driver.put_descriptors(DESCRIPTORS, &list);
        driver.put_descriptors(TABLE, &table);
        driver.board.private.lock().unwrap().extend(private);
        if let Some(index) = index {
            driver.write(AVAILABLE + 2, &index.to_le_bytes());
            driver.notify();
        }
        let mut offered = 0;
        for head in heads {
            driver.offer(head);
            offered += 1;
        }
        let counts = driver.counts();
        let done = counts.reads + counts.writes + counts.flushes + counts.failed;
        prop_assert!(counts.resets_needed <= 1);
        prop_assert!(counts.private <= counts.resets_needed);
        // Each request without a fault was answered: of the identity too, which has no count.
        if counts.resets_needed == 0 && index.is_none() {
            prop_assert!(done <= offered);
        }
        prop_assert_eq!(driver.status() & NEEDS_RESET != 0, counts.resets_needed == 1);
        driver.board.private.lock().unwrap().clear();
        driver.begin();
        prop_assert_eq!(driver.request(VIRTIO_BLK_T_IN, 5, 512, true).0, 0);
        prop_assert_eq!(std::fs::metadata(image.path()).unwrap().len(), 64 * 512);
    }
}
