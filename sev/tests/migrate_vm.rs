//! VMs travel between two machines while their guests run.

#[path = "common/mod.rs"]
mod common;

use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::*;
use embedded_io_adapters::std::FromStd;
use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use kvm_ops_core::{Backend, Error, Gfn, Gpa, Privacy, Step, Tech, VcpuId, VcpuOps, VmOps};
use kvm_ops_sev::migrate::{
    Flow, MigrateError, MigrateSource, MigrateTarget, Owner, Packet, Phase, Progress, Receiver,
    SendLimits, Sender,
};
use kvm_ops_sev::{GuestState, SevVcpu, SevVm};
use kvm_ops_sim::{SevSetup, SimHost};
use soft_amd_sp::{Command, Status};

type Sev = SevVm<SimHost>;

const PAGES: u64 = 96;
const TRAVELLING: [Tech; 2] = [Tech::Sev, Tech::SevEs];

/// Counts in private memory, one page after the other, and keeps no other state: its next VM
/// goes on from memory. The test sees every count, and must see each once.
struct Counter {
    count: u64,
    state: u8,
    bytes: [u8; 8],
    told: std::sync::Arc<AtomicU64>,
}

const HEAD: u64 = C | RAM;

impl GuestProgram for Counter {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        match (self.state, last) {
            (1, Outcome::Data(bytes)) => {
                self.bytes.copy_from_slice(bytes);
                self.count = u64::from_le_bytes(self.bytes) + 1;
                self.bytes = self.count.to_le_bytes();
                self.state = 2;
                // Somewhere in the other pages first, then the head.
                let page = 1 + self.count % (PAGES / 2 - 1);
                Action::Write {
                    gpa: Gpa::new(HEAD + page * PAGE),
                    data: &self.bytes,
                }
            }
            (2, _) => {
                self.state = 3;
                Action::Write {
                    gpa: Gpa::new(HEAD),
                    data: &self.bytes,
                }
            }
            (3, _) => {
                self.told.store(self.count, Ordering::Release);
                self.state = 1;
                Action::Read {
                    gpa: Gpa::new(HEAD),
                    len: 8,
                }
            }
            _ => {
                self.state = 1;
                Action::Read {
                    gpa: Gpa::new(HEAD),
                    len: 8,
                }
            }
        }
    }
}

fn machine(seed: u64, snp: bool) -> SimHost {
    let setup = SevSetup::new(platform(seed));
    host_from(if snp { setup } else { setup.without_snp() })
}

fn source(host: &SimHost, tech: Tech, ram: &Ram) -> (Sev, SevVcpu<SimHost>) {
    let mut vm = with_ram(host, tech, 1, ram);
    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    let mut head = page(0);
    head[8..16].fill(0xab);
    vm.add_initial_page(&measured(RAM, &head)).unwrap();
    vm.vm_finalize().unwrap();
    // The upper half is shared: it lies in the slot.
    ram.write((PAGES / 2 * PAGE) as usize, b"shared");
    vm.pre_fault_memory(Gfn::new((RAM >> 12) + 1), PAGES / 2 - 1)
        .unwrap();
    (vm, vcpu)
}

fn target(host: &SimHost, tech: Tech, ram: &Ram) -> (Sev, SevVcpu<SimHost>) {
    let vm = with_ram(host, tech, 1, ram);
    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    (vm, vcpu)
}

/// Runs until told to stop or until the VM is not its own any more.
fn run_until(vcpu: &mut SevVcpu<SimHost>, stop: &AtomicBool) -> Option<Error> {
    while !stop.load(Ordering::Acquire) {
        match vcpu.vcpu_run() {
            Ok(_) => {}
            Err(Error::Busy) => thread::sleep(Duration::from_micros(200)),
            Err(error) => return Some(error),
        }
    }
    None
}

fn ends() -> (FromStd<UnixStream>, FromStd<UnixStream>) {
    let (a, b) = UnixStream::pair().unwrap();
    (FromStd::new(a), FromStd::new(b))
}

fn random(out: &mut [u8]) -> kvm_ops_core::Result<()> {
    out.fill(7);
    Ok(())
}

type Ended = Result<Progress, MigrateError>;

/// One link between two VMs, without registers.
fn travel(
    from: &mut Sev,
    to: &mut Sev,
    limits: SendLimits,
    watch: &mut (dyn FnMut(&Progress) -> Flow + Send),
) -> (Ended, Ended) {
    let vendor = sp_of(to).vendor_certs();
    let registers = Mutex::new(Vec::new());
    let (mut near, mut far) = ends();
    let mut incoming = Receiver::new(
        to.incoming(
            vendor,
            Box::new(|_, bytes| {
                registers.lock().unwrap().push(bytes.to_vec());
                Ok(())
            }),
        )
        .unwrap(),
    );
    let outgoing = from
        .outgoing(Box::new(|vcpu| Ok(vec![vcpu.0 as u8; 9])))
        .unwrap();
    let mut sender = Sender::new(outgoing, limits, &mut random)
        .map_err(|(e, _)| e)
        .unwrap();
    let ended = thread::scope(|scope| {
        let sent = scope.spawn(move || {
            let sent = sender.run(&mut near, watch);
            drop(near);
            drop(sender);
            sent
        });
        let received = incoming.run(&mut far, &mut |_| Flow::GoOn);
        drop(far);
        (sent.join().unwrap(), received)
    });
    drop(incoming);
    ended
}

fn sp_of(vm: &Sev) -> std::sync::Arc<soft_amd_sp::Platform> {
    std::sync::Arc::clone(vm.host().sev_platform().unwrap())
}

#[test]
fn a_guest_that_counts_in_its_memory_loses_no_count() {
    for (tech, snp) in TRAVELLING.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        let (here, there) = (machine(1, snp), machine(2, snp));
        let (ram, ram2) = (Ram::new(PAGES * PAGE), Ram::new(PAGES * PAGE));
        let (mut from, mut vcpu) = source(&here, tech, &ram);
        let (mut to, mut vcpu2) = target(&there, tech, &ram2);
        let told = std::sync::Arc::new(AtomicU64::new(0));
        let program = || Counter {
            count: 0,
            state: 0,
            bytes: [0; 8],
            told: told.clone(),
        };
        common::load(&mut vcpu, program());
        let stop = AtomicBool::new(false);
        let (sent, received, died) = thread::scope(|scope| {
            let runner = scope.spawn(|| run_until(&mut vcpu, &stop));
            while told.load(Ordering::Acquire) < 50 {
                thread::yield_now();
            }
            let limits = SendLimits {
                rounds: 3,
                pages_left: 1,
            };
            let (sent, received) = travel(&mut from, &mut to, limits, &mut |_| Flow::GoOn);
            (sent, received, runner.join().unwrap())
        });
        let sent = sent.unwrap();
        assert_eq!(
            (sent.phase, received.unwrap().phase),
            (Phase::Done, Phase::Done)
        );
        assert!(
            sent.pages > PAGES,
            "{tech} {snp}: {} pages, written ones again",
            sent.pages
        );
        assert_eq!(died, Some(Error::Poisoned));
        assert_eq!((from.step(), to.step()), (Step::Poisoned, Step::Runnable));
        assert_eq!(
            (from.guest_state(), to.guest_state()),
            (GuestState::Sent, GuestState::Running)
        );

        // It goes on with the very next number, from memory alone.
        let last = told.load(Ordering::Acquire);
        common::load(&mut vcpu2, program());
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| run_until(&mut vcpu2, &stop));
            let first = loop {
                match told.load(Ordering::Acquire) {
                    same if same == last => thread::yield_now(),
                    more => break more,
                }
            };
            // The last write may have been done and not told.
            assert!(first > last, "{first} after {last}");
            while told.load(Ordering::Acquire) < last + 20 {
                thread::yield_now();
            }
            stop.store(true, Ordering::Release);
            kick_vcpus(&to);
        });
        let mut expected = vec![0; 6];
        expected.copy_from_slice(b"shared");
        assert_eq!(ram2.read((PAGES / 2 * PAGE) as usize, 6), expected);
        drop((vcpu, vcpu2));
        free_clean(from);
        free_clean(to);
        nothing_left(&here);
        nothing_left(&there);
    }
}

/// A guest without exits leaves when its VM's memory changes hands; a kick does it here.
fn kick_vcpus(vm: &Sev) {
    vm.kick_all();
}

#[test]
fn a_cancelled_vm_runs_on_and_its_target_waits_for_the_next() {
    for cancel_at in [Phase::Copying, Phase::Stopped, Phase::Prepared] {
        let (here, there) = (machine(3, true), machine(4, true));
        let (ram, ram2) = (Ram::new(PAGES * PAGE), Ram::new(PAGES * PAGE));
        let (mut from, vcpu) = source(&here, Tech::SevEs, &ram);
        let (mut to, vcpu2) = target(&there, Tech::SevEs, &ram2);
        let (sent, received) = travel(&mut from, &mut to, SendLimits::default(), &mut |p| match p
            .phase
            == cancel_at
        {
            true => Flow::Cancel,
            false => Flow::GoOn,
        });
        assert_eq!(sent, Err(MigrateError::Cancelled));
        assert_eq!(received, Err(MigrateError::Cancelled));
        assert_eq!(
            (from.step(), from.guest_state()),
            (Step::Runnable, GuestState::Running)
        );
        assert_eq!(to.step(), Step::Initialized);
        let (sent, received) = travel(&mut from, &mut to, SendLimits::default(), &mut |_| {
            Flow::GoOn
        });
        assert_eq!(sent.unwrap().phase.owner(), Owner::Target);
        received.unwrap();
        drop((vcpu, vcpu2));
        free_clean(from);
        free_clean(to);
        nothing_left(&here);
        nothing_left(&there);
    }
}

#[test]
fn every_command_that_fails_leaves_one_owner_and_no_page_behind() {
    let commands = [
        Command::PDH_CERT_EXPORT,
        Command::SEND_START,
        Command::SEND_UPDATE_DATA,
        Command::SEND_UPDATE_VMSA,
        Command::SEND_FINISH,
        Command::RECEIVE_START,
        Command::ACTIVATE,
        Command::RECEIVE_UPDATE_DATA,
        Command::RECEIVE_UPDATE_VMSA,
        Command::RECEIVE_FINISH,
    ];
    for (command, snp) in commands.into_iter().flat_map(|c| [(c, false), (c, true)]) {
        for here_fails in [true, false] {
            let (here, there) = (machine(5, snp), machine(6, snp));
            let (ram, ram2) = (Ram::new(PAGES * PAGE), Ram::new(PAGES * PAGE));
            let (mut from, vcpu) = source(&here, Tech::SevEs, &ram);
            let (mut to, vcpu2) = target(&there, Tech::SevEs, &ram2);
            let failing = if here_fails { sp(&here) } else { sp(&there) };
            failing.fail_next(command, Status::HWERROR_PLATFORM);
            let limits = SendLimits::default();
            let (sent, received) = travel(&mut from, &mut to, limits, &mut |_| Flow::GoOn);
            failing.clear_failures();
            if sent.is_err() {
                assert!(received.is_err(), "{command}");
                // The ends were dropped, which gives up what was not finished.
                assert_eq!(
                    (from.step(), to.step()),
                    (Step::Runnable, Step::Initialized)
                );
                let (sent, received) = travel(&mut from, &mut to, limits, &mut |_| Flow::GoOn);
                sent.unwrap();
                received.unwrap();
            }
            assert_eq!(
                (from.step(), to.step()),
                (Step::Poisoned, Step::Runnable),
                "{command}"
            );
            drop((vcpu, vcpu2));
            free_clean(from);
            free_clean(to);
            nothing_left(&here);
            nothing_left(&there);
        }
    }
}

#[test]
fn who_cannot_travel_is_told_so() {
    let (host, ram) = (machine(7, true), Ram::new(PAGES * PAGE));
    let errno = |result: Result<(), Error>| result.unwrap_err().errno();
    let snp = with_ram(&host, Tech::SevSnp, 1, &ram);
    assert_eq!(
        errno(snp.outgoing(Box::new(|_| Ok(vec![]))).map(|_| ())),
        95
    );
    assert_eq!(
        errno(snp.incoming(vec![], Box::new(|_, _| Ok(()))).map(|_| ())),
        95
    );
    let unlaunched = with_ram(&host, Tech::Sev, 1, &ram);
    assert_eq!(
        errno(unlaunched.outgoing(Box::new(|_| Ok(vec![]))).map(|_| ())),
        22
    );
    let (running, vcpu) = source(&host, Tech::Sev, &ram);
    assert_eq!(
        errno(
            running
                .incoming(vec![], Box::new(|_, _| Ok(())))
                .map(|_| ())
        ),
        22
    );
    drop(vcpu);
    free_clean(running);
    free_clean(snp);
    free_clean(unlaunched);
    nothing_left(&host);
}

#[test]
fn a_frame_that_becomes_shared_on_the_way_arrives_shared() {
    let (here, there) = (machine(8, false), machine(9, false));
    let (ram, ram2) = (Ram::new(PAGES * PAGE), Ram::new(PAGES * PAGE));
    let (mut from, vcpu) = source(&here, Tech::Sev, &ram);
    let (mut to, vcpu2) = target(&there, Tech::Sev, &ram2);
    let gfn = Gfn::new((RAM >> 12) + 3);
    ram.write(3 * PAGE as usize, b"in the open");
    // Before the journey here; the raw ends' tests do it during one.
    from.set_memory_attributes(gfn, 1, Privacy::Shared).unwrap();
    let (sent, received) = travel(&mut from, &mut to, SendLimits::default(), &mut |_| {
        Flow::GoOn
    });
    sent.unwrap();
    received.unwrap();
    assert_eq!(to.page_of(gfn), None);
    assert_eq!(ram2.read(3 * PAGE as usize, 11), b"in the open");
    drop((vcpu, vcpu2));
    free_clean(from);
    free_clean(to);
    nothing_left(&here);
    nothing_left(&there);
}

#[test]
fn a_guest_without_its_registers_is_not_finished_and_its_vcpu_does_not_run() {
    let (here, there) = (machine(10, true), machine(11, true));
    let (ram, ram2) = (Ram::new(PAGES * PAGE), Ram::new(PAGES * PAGE));
    let (from, vcpu) = source(&here, Tech::SevEs, &ram);
    let (to, mut vcpu2) = target(&there, Tech::SevEs, &ram2);
    let vendor = sp_of(&to).vendor_certs();
    {
        // Both ends by hand, without the protocol, which refuses this too.
        let mut incoming = to.incoming(vendor, Box::new(|_, _| Ok(()))).unwrap();
        let mut outgoing = from.outgoing(Box::new(|_| Ok(vec![]))).unwrap();
        let shape = outgoing.shape().unwrap();
        incoming.accept(&shape).unwrap();
        let start = outgoing.send_start(&incoming.certs().unwrap()).unwrap();
        incoming.receive_start(&start).unwrap();
        let missing = Err(Error::Invalid(kvm_ops_core::Field::VcpuCount, 1));
        assert_eq!(incoming.receive_finish(), missing);
        let mut packet = Packet::default();
        outgoing.stop().unwrap();
        let content = outgoing.vcpu(VcpuId(0), &mut packet).unwrap();
        incoming.receive_vcpu(VcpuId(0), content, &packet).unwrap();
        assert_eq!(incoming.receive_finish(), Ok(()));
    }
    // Given up: the registers are the host's again, and do not run.
    let early = Error::WrongState(Step::Initialized);
    assert_eq!(vcpu2.vcpu_run().unwrap_err(), early);
    drop((vcpu, vcpu2));
    free_clean(from);
    free_clean(to);
    nothing_left(&here);
    nothing_left(&there);
}
