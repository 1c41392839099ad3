//! Records of runs, and programs that are served from them.

#[path = "common/host.rs"]
mod host;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use host::Host;
use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::{Device, Faults, File, Kernel, Mismatch, Player, Process, Refusal};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::memory::{CreateGuestMemfd, UserspaceMemoryRegion2};
use kvm_ops_uapi::sev::{
    self, EncRegion, SevCmd, SevGuestStatus, SevInit, SevLaunchStart, SevRange,
};
use kvm_ops_uapi::state::Regs;
use kvm_ops_uapi::{Errno, U32, U64};
use proptest::prelude::*;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

const CODE: u64 = 0x1000;
const RAM: u64 = 0x1_0000;
/// More than what a place in a record is named from one address.
const MUCH: u64 = 66 << 20;
const PORT_DATA: u64 = 4096;
/// The program in the guest: 0x1234 to 0x2000, then a port's output and input, and a halt.
const GUEST: [u8; 12] = [
    0xc7, 0x06, 0x00, 0x20, 0x34, 0x12, 0xe6, 0x80, 0xe4, 0x90, 0xf4, 0x90,
];

/// A program that counts at 0x2000, and tells it at a port.
const COUNTER: [u8; 9] = [0xf0, 0xfe, 0x06, 0x00, 0x20, 0xe6, 0x80, 0xeb, 0xf7];
/// The runs of each vCPU that counts.
const COUNTS: u8 = 50;

/// A program that tells at 0x2002 that it runs, waits for the byte at 0x2000, writes 0x1234 to 0x8000, tells that, waits for the
/// byte at 0x2001, and leaves by a port's output.
const WAITER: [u8; 30] = [
    0xfe, 0x06, 0x02, 0x20, 0x80, 0x3e, 0x00, 0x20, 0x00, 0x74, 0xf9, 0xc7, 0x06, 0x00, 0x80, 0x34,
    0x12, 0xfe, 0x06, 0x02, 0x20, 0x80, 0x3e, 0x01, 0x20, 0x00, 0x74, 0xf9, 0xe6, 0x80,
];
const LOW: u64 = 0x8000;

/// Where a run's record goes.
#[derive(Clone, Default)]
struct Out(Arc<Mutex<Vec<u8>>>);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Out {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

/// A program in its process.
struct Program {
    host: Host,
    kvm: i32,
    sev: i32,
    /// What it found out.
    seen: Mutex<Vec<String>>,
    /// The byte that it gives the guest at a port, and the VM type that it tries first.
    gives: u8,
    tries: u64,
}

type Answer<T> = Result<T, Refusal>;

/// What a program waits for that runs a guest on another thread.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    ForGuest,
    ForNothing,
}

impl Program {
    fn new(open: impl Fn(Device) -> Option<File>) -> Option<Self> {
        let host = Host::without_files();
        let kvm = host.task.open(open(Device::Kvm)?).unwrap();
        let sev = open(Device::Sev).map_or(-1, |file| host.task.open(file).unwrap());
        Some(Self {
            host,
            kvm,
            sev,
            seen: Mutex::default(),
            gives: 0x77,
            tries: 31,
        })
    }

    /// The program where addresses and descriptors are others.
    fn elsewhere(player: &Player) -> Option<Self> {
        let mut shifted = Self::new(|device| player.open(device))?;
        shifted.host.map(0x7000);
        shifted.host.task.map(0x3210);
        for _ in 0..5 {
            shifted.host.task.open_event().unwrap();
        }
        // The devices' too.
        shifted.kvm = shifted.host.task.dup(shifted.kvm).unwrap();
        Some(shifted)
    }

    fn note(&self, what: impl std::fmt::Debug) {
        self.seen.lock().unwrap().push(format!("{what:?}"));
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    fn ioctl(&self, fd: i32, ioctl: Ioctl, argument: u64) -> Answer<i64> {
        self.host.ioctl(fd, ioctl, argument)
    }

    fn make(&self, fd: i32, ioctl: Ioctl, argument: u64) -> Answer<i32> {
        Ok(self.ioctl(fd, ioctl, argument)? as i32)
    }

    fn put<T: IntoBytes + Immutable>(&self, fd: i32, ioctl: Ioctl, value: &T) -> Answer<i64> {
        let at = self.host.task.put(value);
        self.ioctl(fd, ioctl, at)
    }

    fn get<T: FromBytes + FromZeros + IntoBytes>(&self, fd: i32, ioctl: Ioctl) -> Answer<T> {
        let at = self.host.task.map(size_of::<T>());
        self.ioctl(fd, ioctl, at)?;
        self.host.task.get(at)
    }

    fn slot(&self, vm: i32, gpa: u64) -> Answer<u64> {
        let ram = self.host.map(RAM);
        self.set_slot(vm, 0, (gpa, ram, RAM))?;
        Ok(ram)
    }

    /// Sets a slot, or deletes it with no bytes.
    fn set_slot(&self, vm: i32, slot: u32, (gpa, ram, bytes): (u64, u64, u64)) -> Answer<()> {
        let region = UserspaceMemoryRegion2 {
            slot: U32::new(slot),
            guest_phys_addr: U64::new(gpa),
            memory_size: U64::new(bytes),
            userspace_addr: U64::new(ram),
            ..UserspaceMemoryRegion2::default()
        };
        self.put(vm, ioctl::KVM_SET_USER_MEMORY_REGION2, &region)
            .map(drop)
    }

    /// A run, and the reason of its exit.
    fn run(&self, vcpu: i32) -> Answer<u32> {
        self.ioctl(vcpu, ioctl::KVM_RUN, 0)?;
        let mut reason = [0; 4];
        let file = self.host.task.file(vcpu)?;
        let area = file.run_area().ok_or(Errno::EBADF)?;
        area.read(8, &mut reason);
        Ok(u32::from_le_bytes(reason))
    }

    fn page(&self, vcpu: i32, at: u64, bytes: &[u8]) -> Answer<()> {
        let file = self.host.task.file(vcpu)?;
        file.run_area().ok_or(Errno::EBADF)?.write(at, bytes);
        Ok(())
    }

    /// A normal VM whose guest writes memory and uses ports.
    fn normal(&self) -> Answer<()> {
        let tried = self.ioctl(self.kvm, ioctl::KVM_CREATE_VM, self.tries);
        self.note(tried.map_err(|refusal| refusal.errno()));
        let vm = self.make(self.kvm, ioctl::KVM_CREATE_VM, 0)?;
        let ram = self.slot(vm, 0)?;
        self.host
            .write(ram + CODE, &GUEST)
            .map_err(|_| Errno::EFAULT)?;
        let bad = self.ioctl(vm, ioctl::KVM_SET_USER_MEMORY_REGION2, 8);
        self.note(bad.map_err(|refusal| refusal.errno()));
        let vcpu = self.make(vm, ioctl::KVM_CREATE_VCPU, 0)?;
        self.host.real_mode(vcpu, CODE)?;
        self.note(self.run(vcpu)?);
        let mut memory = [0; 2];
        self.host
            .read(ram + 0x2000, &mut memory)
            .map_err(|_| Errno::EFAULT)?;
        self.note(memory);
        self.note(self.run(vcpu)?);
        self.page(vcpu, PORT_DATA, &[self.gives])?;
        self.page(vcpu, 1, &[1])?;
        let left = self.ioctl(vcpu, ioctl::KVM_RUN, 0);
        self.note(left.map_err(|refusal| refusal.errno()));
        self.page(vcpu, 1, &[0])?;
        self.note(self.run(vcpu)?);
        let regs: Regs = self.get(vcpu, ioctl::KVM_GET_REGS)?;
        self.note((regs.rax.get() & 0xff, regs.rip.get()));
        Ok(())
    }

    fn command<T>(&self, vm: i32, id: u32, value: &T) -> Answer<T>
    where
        T: FromBytes + FromZeros + IntoBytes + Immutable,
    {
        let data = self.host.task.put(value);
        let cmd = SevCmd {
            id: U32::new(id),
            data: U64::new(data),
            sev_fd: U32::new(self.sev as u32),
            ..SevCmd::default()
        };
        self.put(vm, ioctl::KVM_MEMORY_ENCRYPT_OP, &cmd)?;
        self.host.task.get(data)
    }

    /// The launch of a SEV guest, whose commands point to structures that point to blobs.
    fn launch(&self) -> Answer<()> {
        let vm = self.make(self.kvm, ioctl::KVM_CREATE_VM, 2)?;
        self.command(vm, sev::INIT2, &SevInit::default())?;
        let ram = self.slot(vm, 0)?;
        self.command(vm, sev::LAUNCH_START, &SevLaunchStart::default())?;
        let range = SevRange {
            uaddr: U64::new(ram),
            len: U32::new(4096),
            ..SevRange::default()
        };
        self.command(vm, sev::LAUNCH_UPDATE_DATA, &range)?;
        let room = self.host.task.map(48);
        let range = SevRange {
            uaddr: U64::new(room),
            len: U32::new(48),
            ..SevRange::default()
        };
        let back = self.command(vm, sev::LAUNCH_MEASURE, &range)?;
        assert_eq!(back.uaddr.get(), room, "its own address comes back");
        let measurement: [u8; 48] = self.host.task.get(room)?;
        self.note(measurement);
        let status = self.command(vm, sev::GUEST_STATUS, &SevGuestStatus::new_zeroed())?;
        self.note((status.handle.get(), status.state.get()));
        Ok(())
    }

    fn whole(&self) -> Answer<()> {
        self.normal()?;
        self.launch()
    }

    /// Two vCPUs of one VM, each on a thread of its own, which count in the same place and leave after each number.
    fn counting(&self) -> Answer<()> {
        let vm = self.make(self.kvm, ioctl::KVM_CREATE_VM, 0)?;
        let ram = self.slot(vm, 0)?;
        let code = ram + CODE;
        self.host.write(code, &COUNTER).map_err(|_| Errno::EFAULT)?;
        let count = |id| {
            let vcpu = self.make(vm, ioctl::KVM_CREATE_VCPU, id)?;
            self.host.real_mode(vcpu, CODE)?;
            (0..COUNTS).try_for_each(|_| self.run(vcpu).map(drop))
        };
        thread::scope(|scope| {
            let both = [0, 1].map(|id| scope.spawn(move || count(id)));
            both.into_iter()
                .try_for_each(|thread| thread.join().unwrap())
        })
    }

    /// A slot is set while a guest runs, which writes there; it is deleted before the guest leaves, or after.
    fn slot_in_a_run(&self, waits: Wait, deletes: bool) -> Answer<()> {
        let vm = self.make(self.kvm, ioctl::KVM_CREATE_VM, 0)?;
        let (ram, late) = (self.host.map(LOW), self.host.map(RAM));
        self.set_slot(vm, 0, (0, ram, LOW))?;
        self.poke(ram + CODE, &WAITER)?;
        let vcpu = self.make(vm, ioctl::KVM_CREATE_VCPU, 0)?;
        self.host.real_mode(vcpu, CODE)?;
        thread::scope(|scope| {
            let run = scope.spawn(|| self.run(vcpu));
            // In a replay the guest's words come when the run ends.
            let told = |count| while waits == Wait::ForGuest && self.peek(ram + 0x2002) != count {};
            told([1]);
            self.set_slot(vm, 1, (LOW, late, RAM))?;
            self.poke(ram + 0x2000, &[1])?;
            told([2]);
            if deletes {
                self.set_slot(vm, 1, (LOW, late, 0))?;
                self.note(self.peek::<2>(late));
            }
            self.poke(ram + 0x2001, &[1])?;
            self.note(run.join().unwrap()?);
            self.note(self.peek::<2>(late));
            Ok(())
        })
    }

    fn peek<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.host.read(address, &mut bytes).unwrap();
        bytes
    }

    fn poke(&self, address: u64, bytes: &[u8]) -> Answer<()> {
        let written = self.host.write(address, bytes);
        written.map_err(|_| Errno::EFAULT.into())
    }

    /// Two vCPUs of two VMs, each on a thread of its own.
    fn threads(&self) -> Answer<()> {
        let one = || {
            let vm = self.make(self.kvm, ioctl::KVM_CREATE_VM, 0)?;
            let ram = self.slot(vm, 0)?;
            self.host
                .write(ram + CODE, &GUEST)
                .map_err(|_| Errno::EFAULT)?;
            let vcpu = self.make(vm, ioctl::KVM_CREATE_VCPU, 0)?;
            self.host.real_mode(vcpu, CODE)?;
            for _ in 0..3 {
                self.run(vcpu)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let both = [scope.spawn(one), scope.spawn(one)];
            both.into_iter()
                .try_for_each(|thread| thread.join().unwrap())
        })
    }
}

/// The record of a program, and what it saw.
fn recorded(body: impl Fn(&Program) -> Answer<()>) -> (String, Vec<String>) {
    let out = Out::default();
    let host = SimHost::new(Vendor::Amd);
    let kernel = Kernel::recording(host, Faults::default(), Box::new(out.clone())).unwrap();
    let program = Program::new(|device| match device {
        Device::Sev => kernel.open_sev(),
        _ => Some(kernel.open_kvm()),
    })
    .unwrap();
    body(&program).unwrap();
    (out.text(), program.seen())
}

/// The player of a record, and what it stopped at.
fn player(text: &str) -> (Player, Arc<Mutex<Option<Mismatch>>>) {
    let stopped = Arc::new(Mutex::new(None));
    let at = Arc::clone(&stopped);
    let patience = Duration::from_millis(200);
    let player = Player::with_patience(text, patience, move |mismatch| {
        *at.lock().unwrap() = Some(mismatch.clone());
    });
    (player.unwrap(), stopped)
}

#[test]
fn a_program_is_served_from_its_record_wherever_its_memory_and_descriptors_are() {
    let (text, seen) = recorded(Program::whole);
    let (player, stopped) = player(&text);
    let program = Program::elsewhere(&player).unwrap();
    program
        .whole()
        .unwrap_or_else(|_| panic!("{:?}", stopped.lock().unwrap()));
    assert_eq!(program.seen(), seen);
    let (calls, made) = player.progress();
    assert!(calls == made && calls > 20, "{made} of {calls}");
    assert_eq!(seen[3], "[52, 18]", "memory that the guest wrote");
}

#[test]
fn a_record_goes_on_after_a_program_pinned_much_memory() {
    let (text, _) = recorded(|program| {
        let vm = program.make(program.kvm, ioctl::KVM_CREATE_VM, 2)?;
        program.command(vm, sev::INIT2, &SevInit::default())?;
        let region = EncRegion {
            addr: U64::new(program.host.map(MUCH)),
            size: U64::new(MUCH),
        };
        program.put(vm, ioctl::KVM_MEMORY_ENCRYPT_REG_REGION, &region)?;
        program.ioctl(program.kvm, ioctl::KVM_GET_API_VERSION, 0)?;
        Ok(())
    });
    let reads = text.lines().filter(|line| line.starts_with(" read"));
    assert_eq!(
        reads.count(),
        3,
        "two structures of the command, and the region's"
    );
    assert!(text.ends_with("KVM_GET_API_VERSION 0\n= 12\n"));
}

#[test]
fn files_without_ioctls_refuse_them_in_a_replay_as_ever() {
    let body = |program: &Program| {
        let vm = program.make(program.kvm, ioctl::KVM_CREATE_VM, 1)?;
        let size = CreateGuestMemfd {
            size: U64::new(RAM),
            ..CreateGuestMemfd::default()
        };
        let memory = program.put(vm, ioctl::KVM_CREATE_GUEST_MEMFD, &size)? as i32;
        let counts = program.make(vm, ioctl::KVM_GET_STATS_FD, 0)?;
        for file in [memory, counts] {
            let refused = program.ioctl(file, ioctl::KVM_GET_API_VERSION, 0);
            program.note(refused.map_err(|refusal| refusal.errno()));
        }
        Ok(())
    };
    let (text, seen) = recorded(body);
    let (player, stopped) = player(&text);
    let program = Program::elsewhere(&player).unwrap();
    body(&program).unwrap_or_else(|_| panic!("{:?}", stopped.lock().unwrap()));
    assert_eq!(program.seen(), seen);
    assert_eq!(*stopped.lock().unwrap(), None);
}

#[test]
fn memory_is_recorded_in_the_order_in_which_vcpus_of_one_vm_wrote_it() {
    let (text, _) = recorded(Program::counting);
    let changes = text
        .lines()
        .filter_map(|line| line.strip_prefix(" memory 0 2000 "));
    let counts: Vec<u8> = changes
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    assert!(counts.is_sorted(), "{counts:?}");
    assert_eq!(counts.last(), Some(&(2 * COUNTS)));
}

#[test]
fn what_a_guest_writes_to_a_slot_that_is_set_and_deleted_in_its_run_is_recorded() {
    for deletes in [false, true] {
        let (text, seen) = recorded(|program| program.slot_in_a_run(Wait::ForGuest, deletes));
        let lines: Vec<&str> = text.lines().collect();
        let word = lines.iter().position(|line| *line == " memory 1 0 3412");
        let call = lines[..word.expect(&text)]
            .iter()
            .rfind(|line| line.starts_with("thread "));
        let name = if deletes {
            "KVM_SET_USER_MEMORY_REGION2"
        } else {
            "KVM_RUN"
        };
        assert!(call.unwrap().contains(name), "{text}");
        let (player, stopped) = player(&text);
        let program = Program::elsewhere(&player).unwrap();
        program
            .slot_in_a_run(Wait::ForNothing, deletes)
            .unwrap_or_else(|_| panic!("{:?}", stopped.lock().unwrap()));
        assert_eq!(program.seen(), seen);
    }
}

#[test]
fn clocks_tell_a_thread_between_two_calls_what_they_told_it_in_the_record() {
    const CLOCKS: [(i32, Duration); 4] = [
        (1, Duration::new(7, 0)),
        (0, Duration::new(1_000_000_000, 5)),
        (1, Duration::new(7, 999_999_999)),
        (1, Duration::new(8, 1)),
    ];
    let out = Out::default();
    let host = SimHost::new(Vendor::Amd);
    let kernel = Kernel::recording(host, Faults::default(), Box::new(out.clone())).unwrap();
    kernel.looked_at_clock(1, Duration::ZERO);
    let ask = |program: &Program| program.ioctl(program.kvm, ioctl::KVM_GET_API_VERSION, 0);
    let program = Program::new(|_| Some(kernel.open_kvm())).unwrap();
    for (clock, time) in CLOCKS {
        kernel.looked_at_clock(clock, time);
    }
    ask(&program).unwrap();
    ask(&program).unwrap();
    let (player, stopped) = player(&out.text());
    assert_eq!(player.clock(1), None, "a thread without a call");
    let program = Program::new(|_| player.open(Device::Kvm)).unwrap();
    for (clock, time) in CLOCKS {
        assert_eq!(player.clock(clock), Some(time));
    }
    assert_eq!(player.clock(1), None, "one look more");
    ask(&program).unwrap();
    assert_eq!(player.clock(1), None, "no look behind that call");
    ask(&program).unwrap();
    assert_eq!(*stopped.lock().unwrap(), None);
}

/// Two threads that make a call each, take a lock so often, and make another call. Returns the order of the takings.
fn takings(
    program: &Program,
    takings: [u32; 2],
    take: impl Fn(&mut dyn FnMut()) + Sync,
) -> Vec<usize> {
    let order = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for (name, count) in takings.into_iter().enumerate() {
            let (order, take) = (&order, &take);
            scope.spawn(move || {
                // The calls tell which thread of the record it is.
                let ask = |value| {
                    let _ = program.ioctl(program.kvm, ioctl::KVM_CHECK_EXTENSION, value);
                };
                ask(name as u64);
                for _ in 0..count {
                    take(&mut || order.lock().unwrap().push(name));
                    thread::yield_now();
                }
                ask(name as u64);
            });
        }
    });
    order.into_inner().unwrap()
}

#[test]
fn threads_take_a_lock_in_the_order_of_the_record() {
    const NAME: &str = "program+10";
    let out = Out::default();
    let host = SimHost::new(Vendor::Amd);
    let kernel = Kernel::recording(host, Faults::default(), Box::new(out.clone())).unwrap();
    let program = Program::new(|_| Some(kernel.open_kvm())).unwrap();
    let lock = Mutex::new(());
    let recorded = takings(&program, [200, 100], |work| {
        let _taken = lock.lock().unwrap();
        kernel.took_lock(NAME);
        work();
    });
    for _ in 0..5 {
        let (player, stopped) = player(&out.text());
        let program = Program::new(|_| player.open(Device::Kvm)).unwrap();
        let lock = Mutex::new(());
        let played = takings(&program, [200, 100], |work| {
            let counts = player.wait_for_lock(NAME);
            let taken = lock.lock().unwrap();
            if counts {
                player.took_lock(NAME);
            }
            work();
            drop(taken);
            player.released_lock(NAME);
        });
        assert_eq!(*stopped.lock().unwrap(), None);
        assert_eq!(played, recorded);
    }
}

#[test]
fn a_thread_is_told_that_the_others_wait_for_it_to_take_a_lock() {
    let ask = |thread: u32, steps: &str| {
        let ioctl = ioctl::KVM_GET_API_VERSION.number();
        format!("thread {thread} ioctl 0 {ioctl:x} KVM_GET_API_VERSION 0\n{steps}= 12\n")
    };
    let text = format!(
        "kvm-ops record 1\nmachine amd 0 0 0 0\nthread 0 open /dev/kvm 0\n= file 0\n\
         thread 0 open /dev/kvm 1\n= file 1\n{}{}{}{}",
        ask(0, ""),
        ask(1, ""),
        ask(0, " lock program+10 1\n lock program+10 3\n"),
        ask(1, " lock program+10 2\n"),
    );
    let (player, stopped) = player(&text);
    let program = Program::new(|_| player.open(Device::Kvm)).unwrap();
    let ask = || {
        program
            .ioctl(program.kvm, ioctl::KVM_GET_API_VERSION, 0)
            .unwrap()
    };
    let take = || {
        assert!(player.wait_for_lock("program+10"));
        player.took_lock("program+10");
    };
    ask();
    assert!(player.is_awaited());
    take();
    assert!(!player.is_awaited(), "it has it");
    thread::scope(|scope| {
        scope.spawn(|| {
            assert!(!player.is_awaited(), "a thread without a call");
            ask();
            assert!(!player.is_awaited(), "the lock is not free");
            player.released_lock("program+10");
            assert!(player.is_awaited());
            take();
            player.released_lock("program+10");
        });
    });
    take();
    player.released_lock("program+10");
    assert!(!player.wait_for_lock("program+20"), "no lock of the record");
    assert_eq!(*stopped.lock().unwrap(), None);
}

#[test]
fn the_first_call_that_differs_is_told_with_what_was_expected() {
    let (text, _) = recorded(Program::whole);
    let told = |change: &dyn Fn(&mut Program)| {
        let (player, stopped) = player(&text);
        let mut program = Program::elsewhere(&player).unwrap();
        change(&mut program);
        let refusal = program.whole().unwrap_err();
        assert_eq!(refusal.errno(), Errno::EIO);
        let told = stopped.lock().unwrap().clone();
        told.unwrap().to_string()
    };
    let value = told(&|program| program.tries = 30);
    assert!(
        value.contains("call 2 of the record is `thread 0 ioctl 0 ae01 KVM_CREATE_VM 1f`")
            && value.contains("the program makes `ioctl 0 ae01 KVM_CREATE_VM 1e`"),
        "{value}"
    );
    let page = told(&|program| program.gives = 0x78);
    assert!(
        page.contains("KVM_RUN") && page.contains("run page at 0x1000"),
        "{page}"
    );
    let fd = told(&|program| program.sev = program.kvm);
    assert!(
        fd.contains("KVM_MEMORY_ENCRYPT_OP") && fd.contains("arg+0 differs from byte 0x14 on"),
        "{fd}"
    );
}

#[test]
fn a_program_that_goes_on_is_stopped_at_the_end_of_the_record() {
    let (text, _) = recorded(Program::normal);
    let (player, stopped) = player(&text);
    let program = Program::elsewhere(&player).unwrap();
    program.normal().unwrap();
    assert!(program.normal().is_err());
    let told = stopped.lock().unwrap().clone().unwrap().to_string();
    assert!(
        told.contains("is `the end`: thread 0 makes one more call"),
        "{told}"
    );
}

#[test]
fn threads_are_served_each_its_own_part_in_the_order_of_the_record() {
    let (text, _) = recorded(Program::threads);
    for _ in 0..5 {
        let (player, stopped) = player(&text);
        let program = Program::elsewhere(&player).unwrap();
        let done = program.threads();
        assert!(done.is_ok(), "{:?}", stopped.lock().unwrap());
        let (calls, made) = player.progress();
        assert_eq!(calls, made);
    }
}

#[test]
fn a_call_that_is_not_made_is_told_to_the_one_that_waits_for_it() {
    let (text, _) = recorded(Program::threads);
    let (player, stopped) = player(&text);
    let program = Program::elsewhere(&player).unwrap();
    // One thread of two: sooner or later it waits for the other's call.
    let alone = thread::scope(|scope| {
        let one = scope.spawn(|| {
            let vm = program.make(program.kvm, ioctl::KVM_CREATE_VM, 0)?;
            program.slot(vm, 0)?;
            let vcpu = program.make(vm, ioctl::KVM_CREATE_VCPU, 0)?;
            program.host.real_mode(vcpu, CODE)?;
            (0..3).try_for_each(|_| program.run(vcpu).map(drop))
        });
        one.join().unwrap()
    });
    let told = stopped.lock().unwrap().clone();
    let (calls, made) = player.progress();
    assert!(made < calls);
    assert!(alone.is_ok() || told.unwrap().got.contains("it was not made"));
}

#[test]
fn a_text_that_is_no_record_names_the_line() {
    let (text, _) = recorded(Program::normal);
    let refused = |text: &str| Player::new(text, |_| ()).err().unwrap().to_string();
    assert!(refused("").starts_with("line 1: this is no record"));
    let old = text.replacen("record 1", "record 0", 1);
    assert!(refused(&old).starts_with("line 1: "));
    let lines: Vec<&str> = text.lines().collect();
    let cut = lines[..lines.len() - 1].join("\n");
    let end = format!("line {}: the record ends inside of a call", lines.len());
    assert_eq!(refused(&cut), end);
    let lost = format!("{text}lost ae01 1000\n");
    assert!(refused(&lost).contains("memory that no argument leads to"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Changed files are refused or played to the first difference. Neither panics.
    #[test]
    fn records_that_were_cut_or_changed_do_no_harm(
        cut in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        static TEXT: std::sync::OnceLock<String> = std::sync::OnceLock::new();
        let mut bytes = TEXT.get_or_init(|| recorded(Program::whole).0).clone().into_bytes();
        for (place, byte) in edits {
            let at = place.index(bytes.len());
            // Mostly what the format has.
            bytes[at] = b"0123456789abcdef+-* \n=trw"[usize::from(byte) % 25];
        }
        bytes.truncate(cut.index(bytes.len() * 2).max(1).min(bytes.len()));
        let text = String::from_utf8(bytes).unwrap();
        let played = Player::with_patience(&text, Duration::from_millis(5), |_| ());
        if let Ok(player) = played
            && let Some(program) = Program::elsewhere(&player)
        {
            let _ = program.whole();
        }
    }
}
