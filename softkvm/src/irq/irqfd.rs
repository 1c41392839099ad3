//! `KVM_IRQFD`: eventfds that interrupt.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use kvm_ops::sim::Pin;
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::checks::Check;
use kvm_ops_uapi::checks::irqfd::{
    COPY, DESCRIPTOR, EVENT, FLAGS, RESAMPLE, RESAMPLE_DESCRIPTOR, RESAMPLE_EVENT, UNUSED,
};
use kvm_ops_uapi::irq::{Irqfd as Args, irqfd_flags};

use super::{Irq, Route, Source, is_same};
use crate::refusal::{Result, ensure};
use crate::vm::{IrqchipKind, Vm};
use crate::{EventFd, Process, Watch, arg};

/// An eventfd that interrupts.
struct Irqfd {
    event: Arc<dyn EventFd>,
    gsi: u32,
    /// Told when the interrupt of its level ends.
    resample: Option<Arc<dyn EventFd>>,
    /// Ends with the entry.
    #[expect(dead_code, reason = "it is kept")]
    watch: Box<dyn Watch>,
}

/// All of a VM.
#[derive(Default)]
pub(super) struct Irqfds(Vec<Irqfd>);

/// The eventfd behind a number, with the rows for what it may not be.
pub(super) fn event(
    process: &dyn Process,
    number: u32,
    open: Check,
    is_event: Check,
) -> Result<Arc<dyn EventFd>> {
    let event = process.eventfd(number as i32);
    event.map_err(|errno| match errno {
        Errno::EBADF => open.into(),
        _ => is_event.into(),
    })
}

impl Irq {
    /// The eventfd of a line was signalled.
    fn signalled(&self, gsi: u32, level: bool) {
        if level {
            self.set_line(gsi, Source::Resample, true);
            return;
        }
        for high in [true, false] {
            self.set_line(gsi, Source::User, high);
        }
    }

    /// The interrupt of an input ended: levels of eventfds that hold it are taken back, and their owners told.
    pub(super) fn resample(&self, pin: Pin) {
        let mut lines = self.irqfds().resampled();
        // Most VMs have none, and this is the end of every interrupt.
        if lines.is_empty() {
            return;
        }
        {
            let state = self.lock();
            lines.retain(|gsi| state.routes.of(*gsi).contains(&Route::Pin(pin)));
        }
        for gsi in lines {
            let told = self.irqfds().resamplers(gsi);
            self.set_line(gsi, Source::Resample, false);
            told.iter().for_each(|event| event.signal());
        }
    }
}

impl Irqfds {
    /// The lines with levels that are taken back.
    fn resampled(&self) -> BTreeSet<u32> {
        let levels = self.0.iter().filter(|irqfd| irqfd.resample.is_some());
        levels.map(|irqfd| irqfd.gsi).collect()
    }

    fn resamplers(&self, gsi: u32) -> Vec<Arc<dyn EventFd>> {
        let of_line = self.0.iter().filter(|irqfd| irqfd.gsi == gsi);
        of_line.filter_map(|irqfd| irqfd.resample.clone()).collect()
    }
}

/// `KVM_IRQFD`.
pub(crate) fn irqfd(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: Args = arg::read(process, argument, COPY)?;
    let flags = args.flags.get();
    ensure(
        flags & !(irqfd_flags::DEASSIGN | irqfd_flags::RESAMPLE) == 0,
        FLAGS,
    )?;
    match flags & irqfd_flags::DEASSIGN {
        0 => assign(vm, process, &args, flags & irqfd_flags::RESAMPLE != 0),
        _ => deassign(vm, process, &args),
    }
}

fn assign(vm: &Vm, process: &dyn Process, args: &Args, level: bool) -> Result<i64> {
    let kind = vm.lock().irqchip_kind();
    ensure(!level || kind == IrqchipKind::Full, RESAMPLE)?;
    let event_fd = event(process, args.fd.get(), DESCRIPTOR, EVENT)?;
    let resample = match level {
        true => Some(event(
            process,
            args.resamplefd.get(),
            RESAMPLE_DESCRIPTOR,
            RESAMPLE_EVENT,
        )?),
        false => None,
    };
    if kind != IrqchipKind::None {
        vm.require_wires()?;
    }
    let gsi = args.gsi.get();
    let irq: Weak<Irq> = Arc::downgrade(vm.irq());
    let wake = move || {
        if let Some(irq) = irq.upgrade() {
            irq.signalled(gsi, level);
        }
    };
    // An eventfd with an irqfd, of whichever VM, takes no second one.
    let watch = event_fd.watch(Box::new(wake)).map_err(|_| UNUSED)?;
    vm.irq().irqfds().0.push(Irqfd {
        event: event_fd,
        gsi,
        resample,
        watch,
    });
    Ok(0)
}

/// No irqfd at all is none to take away.
fn deassign(vm: &Vm, process: &dyn Process, args: &Args) -> Result<i64> {
    let event_fd = event(process, args.fd.get(), DESCRIPTOR, EVENT)?;
    let gsi = args.gsi.get();
    let gone: Vec<Irqfd> = {
        let mut irqfds = vm.irq().irqfds();
        let is_meant = |irqfd: &mut Irqfd| irqfd.gsi == gsi && is_same(&irqfd.event, &event_fd);
        irqfds.0.extract_if(.., is_meant).collect()
    };
    // A level that nothing takes back any more falls.
    if gone.iter().any(|irqfd| irqfd.resample.is_some())
        && vm.irq().irqfds().resamplers(gsi).is_empty()
    {
        vm.irq().set_line(gsi, Source::Resample, false);
    }
    // Not under the lock: whoever has the eventfds has locks too.
    drop(gone);
    Ok(0)
}
