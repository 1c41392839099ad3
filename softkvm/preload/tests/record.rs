//! Records of a real program: the client of this project, run again with the library in front of libc.

mod common;
#[path = "client/guest.rs"]
#[allow(dead_code)] // The client's tests use the rest.
mod guest;

use std::cell::UnsafeCell;
use std::path::{Path, PathBuf};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{again_with, run_again};
use kvm_ops::{
    Exit, Gpa, HostRange, MemSlot, Regs, SevParams, SlotId, VcpuId, VcpuOps, VmConfig, create,
};
use vm_memory::MmapRegion;

/// Set where the program shall differ from the one that was recorded.
const OTHER: &str = "KVM_OPS_TEST_OTHER";

/// Milliseconds for which a program waits.
const WAITS: &str = "KVM_OPS_TEST_WAITS";

/// A file of its own, which is gone when the test is over.
struct Record(PathBuf);

impl Record {
    fn new(name: &str) -> Self {
        let file = format!("kvm-ops-{}-{name}.txt", std::process::id());
        Self(std::env::temp_dir().join(file))
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.0).unwrap()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Guests of each SEV technology up to the end of their launch, with their measurements.
fn launches() {
    let host = guest::host();
    let policy = std::env::var_os(OTHER).map(|_| 1);
    for tech in guest::TECHS {
        let memory = guest::memory();
        let params = SevParams {
            policy: policy.filter(|_| tech == kvm_ops::Tech::Sev),
            ..SevParams::default()
        };
        let mut vm = create(&host, &guest::config(tech, params)).unwrap();
        vm.set_memory_slot(guest::slot(&memory)).unwrap();
        guest::add_pages(&mut vm);
        vm.finalize().unwrap();
        assert!(vm.destroy().is_clean());
    }
}

/// A normal VM whose guest writes a word to 0x2000, says it at a port and halts.
fn executes() {
    const CODE: [u8; 12] = [
        0xc7, 0x06, 0x00, 0x20, 0x34, 0x12, 0xa1, 0x00, 0x20, 0xe7, 0x80, 0xf4,
    ];
    let host = guest::host();
    let memory: MmapRegion<()> = MmapRegion::new(0x1_0000).unwrap();
    let at = memory.as_ptr();
    // SAFETY: nothing else uses the region yet, and it has room.
    unsafe { std::ptr::copy_nonoverlapping(CODE.as_ptr(), at.add(0x1000), CODE.len()) };
    let mut vm = create(&host, &VmConfig::normal()).unwrap();
    // SAFETY: the region outlives the VM, and nothing references its contents while guests run.
    let range = unsafe { HostRange::new(at as u64, memory.size() as u64) }.unwrap();
    vm.set_memory_slot(MemSlot::new(SlotId(0), Gpa::new(0), range))
        .unwrap();
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.selector, sregs.cs.base) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = Regs {
        rip: 0x1000,
        rflags: 2,
        ..Regs::default()
    };
    vcpu.set_regs(&regs).unwrap();
    vm.finalize().unwrap();
    let exit = vcpu.vcpu_run().unwrap();
    assert!(matches!(exit, Exit::IoOut { port: 0x80, .. }), "{exit:?}");
    // SAFETY: the vCPU is out of the guest.
    let word = unsafe { at.add(0x2000).cast::<u16>().read_volatile() };
    assert_eq!(word, 0x1234);
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::Hlt));
    drop(vcpu);
    assert!(vm.destroy().is_clean());
}

/// The system's time, which no library changes.
fn system_time() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: there is room for a time.
    unsafe { libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Looks at clocks between two calls, says what they told, and waits up to a time of one.
fn looks() {
    const WAIT: Duration = Duration::from_millis(50);
    let host = guest::host();
    let vm = create(&host, &VmConfig::normal()).unwrap();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    println!("told {:?} {:?} {:?}", now(), Instant::now(), now());
    let started = system_time();
    let until = now() + WAIT;
    println!("told {until:?}");
    let until = libc::timespec {
        tv_sec: until.as_secs() as libc::time_t,
        tv_nsec: until.subsec_nanos().into(),
    };
    // SAFETY: all zero is a semaphore that waits, and both values live through the call.
    let waited = unsafe {
        let mut semaphore: libc::sem_t = std::mem::zeroed();
        libc::sem_timedwait(&raw mut semaphore, &raw const until)
    };
    assert_eq!(waited, -1);
    let waited = system_time() - started;
    assert!(waited >= WAIT && waited < 20 * WAIT, "{waited:?}");
    // The looks are part of the record with the next call.
    assert!(vm.destroy().is_clean());
    let vm = create(&host, &VmConfig::normal()).unwrap();
    assert!(vm.destroy().is_clean());
}

/// A lock whose order is part of a record: one of a program's variables.
struct Lock(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: made to be shared by threads.
unsafe impl Sync for Lock {}

static LOCK: Lock = Lock(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER));

/// Does something with the lock.
fn locked<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: the lock is never moved.
    assert_eq!(unsafe { libc::pthread_mutex_lock(LOCK.0.get()) }, 0);
    let result = work();
    // SAFETY: as above; this thread has taken it.
    assert_eq!(unsafe { libc::pthread_mutex_unlock(LOCK.0.get()) }, 0);
    result
}

/// Two threads take a lock as often as they can, and say in which order. Now and then each waits for nothing, for as long as a
/// variable says.
fn takes_turns() {
    const TAKINGS: u32 = 300;
    const REST: u32 = 30;
    let wait = std::env::var(WAITS).unwrap().parse().unwrap();
    let order = Mutex::new(String::new());
    let host = guest::host();
    let ask = || drop(guest::host());
    // The first call says which thread of the record it is, so they make it one after the other.
    let known = Barrier::new(2);
    let turns = |name: char| {
        if name == 'b' {
            known.wait();
        }
        ask();
        if name == 'a' {
            known.wait();
        }
        for n in 0..TAKINGS {
            locked(|| order.lock().unwrap().push(name));
            if n % REST == 0 {
                // SAFETY: there are no descriptors.
                unsafe { libc::poll(std::ptr::null_mut(), 0, wait) };
            }
        }
        // What it took is part of the record with the next call.
        ask();
    };
    std::thread::scope(|scope| {
        let turns = &turns;
        for name in ['a', 'b'] {
            scope.spawn(move || turns(name));
        }
    });
    drop(host);
    println!("order {}", order.lock().unwrap());
}

/// Records a test's run on a machine, and serves it from the record.
fn both(test: &str, vendor: &str, record: &Record) {
    let path: &Path = &record.0;
    let recorded = again_with(test, vendor, &[("KVM_OPS_RECORD", path)]).expect("the outer run");
    let calls = |log: &str| {
        log.lines()
            .filter(|line| line.starts_with("ioctl("))
            .count()
    };
    let served = again_with(test, "none", &[("KVM_OPS_REPLAY", path)]).expect("the outer run");
    assert!(calls(&recorded) > 10);
    assert_eq!(calls(&recorded), calls(&served));
}

/// What a test prints that is run again and passes.
fn text_of(test: &str, vendor: &str, variables: &[(&str, &Path)]) -> String {
    let (output, _) = run_again(test, vendor, variables);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

#[test]
fn launches_of_sev_guests_are_served_from_their_record_and_a_changed_one_is_stopped() {
    const NAME: &str =
        "launches_of_sev_guests_are_served_from_their_record_and_a_changed_one_is_stopped";
    if common::is_inside() {
        return launches();
    }
    let record = Record::new("launches");
    both(NAME, "amd", &record);
    assert!(record.text().contains("KVM_MEMORY_ENCRYPT_OP"));
    let variables = [
        ("KVM_OPS_REPLAY", record.0.as_path()),
        (OTHER, Path::new("1")),
    ];
    let (output, _) = run_again(NAME, "none", &variables);
    assert_eq!(output.status.code(), Some(3));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("kvm-ops replay: call ") && text.contains("arg*8+0 differs from byte 0x4 on"),
        "{text}"
    );
}

#[test]
fn a_guest_that_ran_is_served_from_the_record_with_what_it_wrote() {
    const NAME: &str = "a_guest_that_ran_is_served_from_the_record_with_what_it_wrote";
    if common::is_inside() {
        return executes();
    }
    for vendor in ["amd", "intel"] {
        let record = Record::new(vendor);
        both(NAME, vendor, &record);
        assert!(
            record.text().contains(" memory 0 2000 3412\n"),
            "{}",
            record.text()
        );
    }
}

#[test]
fn clocks_tell_the_program_again_what_they_told_it_and_its_waits_last_as_long() {
    const NAME: &str = "clocks_tell_the_program_again_what_they_told_it_and_its_waits_last_as_long";
    if common::is_inside() {
        return looks();
    }
    let record = Record::new("clocks");
    let told = |vendor, variable| {
        let text = text_of(NAME, vendor, &[(variable, &record.0)]);
        let lines = text.lines().filter(|line| line.starts_with("told "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let first = told("amd", "KVM_OPS_RECORD");
    assert_eq!(first.len(), 2);
    assert_eq!(first, told("none", "KVM_OPS_REPLAY"));
}

#[test]
fn threads_take_a_lock_in_the_order_of_the_record_and_wait_for_nothing_else_in_their_turn() {
    const NAME: &str =
        "threads_take_a_lock_in_the_order_of_the_record_and_wait_for_nothing_else_in_their_turn";
    if common::is_inside() {
        return takes_turns();
    }
    let record = Record::new("turns");
    let order = |vendor, variable, wait| {
        let variables = [(variable, record.0.as_path()), (WAITS, Path::new(wait))];
        let text = text_of(NAME, vendor, &variables);
        let line = text.lines().find_map(|line| line.strip_prefix("order "));
        line.expect("the order").to_owned()
    };
    let first = order("amd", "KVM_OPS_RECORD", "1");
    let hand_overs = first.as_bytes().windows(2).filter(|two| two[0] != two[1]);
    assert!(hand_overs.count() > 2, "{first}");
    for _ in 0..3 {
        let started = Instant::now();
        // Each wait would last a minute.
        assert_eq!(first, order("none", "KVM_OPS_REPLAY", "60000"));
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}

#[test]
fn a_record_is_not_written_over() {
    const NAME: &str = "a_record_is_not_written_over";
    if common::is_inside() {
        return executes();
    }
    let record = Record::new("kept");
    std::fs::write(&record.0, "mine").unwrap();
    let (output, _) = run_again(NAME, "amd", &[("KVM_OPS_RECORD", &record.0)]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(record.text(), "mine");
}
