//! The table of routes.

use std::collections::BTreeMap;

use kvm_ops::Msi;
use kvm_ops::sim::Pin;
use kvm_ops_uapi::checks::gsi_routing::{
    ADDRESS, CHIP, COPY, COUNT, ENTRIES, ENTRY_FLAGS, FLAGS, GSI, IRQCHIP, KNOWN, ONCE, SPLIT,
};
use kvm_ops_uapi::irq::{IrqchipRoute, MSI_VALID_DEVID, MsiRoute, route_type};
use kvm_ops_uapi::irqchip::{IOAPIC_PINS, PIC_PINS, chip};
use kvm_ops_uapi::vm::{IrqRouting, IrqRoutingEntry, MAX_IRQ_ROUTES};
use zerocopy::FromBytes;

use crate::refusal::{Result, ensure};
use crate::vm::{IrqchipKind, Vm};
use crate::{Process, arg};

/// A place to which a line leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Pin(Pin),
    Message(Msi),
}

fn chip_of(pin: Pin) -> u32 {
    match pin {
        Pin::Pic(input) if u32::from(input) < PIC_PINS => chip::PIC_MASTER,
        Pin::Pic(_) => chip::PIC_SLAVE,
        Pin::IoApic(_) => chip::IOAPIC,
    }
}

/// The routes of each line.
#[derive(Debug, Default)]
pub(super) struct Routes(BTreeMap<u32, Vec<Route>>);

impl Routes {
    /// Line n leads to input n of the 8259A pair and of the I/O APIC.
    pub(super) fn of_full_irqchip() -> Self {
        let routes = |line: u8| {
            let pic = (u32::from(line) < 2 * PIC_PINS).then_some(Pin::Pic(line));
            let pins = pic.into_iter().chain([Pin::IoApic(line)]);
            (u32::from(line), pins.map(Route::Pin).collect())
        };
        Self((0..IOAPIC_PINS as u8).map(routes).collect())
    }

    pub(super) fn of(&self, gsi: u32) -> &[Route] {
        self.0.get(&gsi).map_or(&[], Vec::as_slice)
    }

    /// True if one of the lines below `reserved` is a level-triggered message with that vector.
    pub(super) fn has_level(&self, vector: u8, reserved: u32) -> bool {
        const LEVEL: u32 = 1 << 15;
        let is = |route: &Route| matches!(route, Route::Message(msi) if msi.data as u8 == vector && msi.data & LEVEL != 0);
        self.0
            .range(..reserved)
            .any(|(_, routes)| routes.iter().any(is))
    }
}

/// The message of a route.
fn message(route: &MsiRoute) -> Msi {
    Msi {
        address: u64::from(route.address_hi.get()) << 32 | u64::from(route.address_lo.get()),
        data: route.data.get(),
    }
}

/// The input of a chip.
fn pin(route: &IrqchipRoute) -> Option<Pin> {
    let input = route.pin.get();
    let (first, pins) = match route.irqchip.get() {
        chip::PIC_MASTER => (0, PIC_PINS),
        chip::PIC_SLAVE => (PIC_PINS, PIC_PINS),
        chip::IOAPIC => (0, IOAPIC_PINS),
        _ => return None,
    };
    let input = (input < pins).then_some((first + input) as u8)?;
    Some(match route.irqchip.get() {
        chip::IOAPIC => Pin::IoApic(input),
        _ => Pin::Pic(input),
    })
}

/// The route of an entry, without its line.
fn route(entry: &IrqRoutingEntry, kind: IrqchipKind, x2apic: bool) -> Result<Route> {
    match entry.kind.get() {
        route_type::IRQCHIP => {
            ensure(kind == IrqchipKind::Full, SPLIT)?;
            let (route, _) = IrqchipRoute::read_from_prefix(&entry.route).map_err(|_| CHIP)?;
            Ok(Route::Pin(pin(&route).ok_or(CHIP)?))
        }
        route_type::MSI => {
            let (route, _) = MsiRoute::read_from_prefix(&entry.route).map_err(|_| KNOWN)?;
            let msi = message(&route);
            ensure(!x2apic || is_x2apic_address(msi), ADDRESS)?;
            Ok(Route::Message(msi))
        }
        _ => Err(KNOWN.into()),
    }
}

/// With `KVM_X2APIC_API_USE_32BIT_IDS` bits 31:8 of the destination are in the upper half's upper bits.
pub(super) fn is_x2apic_address(msi: Msi) -> bool {
    msi.address >> 32 & 0xff == 0
}

/// Only inputs of different chips share a line.
fn has_room(others: &[Route], entry: &IrqRoutingEntry) -> bool {
    let chip = match entry.kind.get() {
        route_type::IRQCHIP => IrqchipRoute::read_from_prefix(&entry.route).ok(),
        _ => None,
    };
    let chip = chip.map(|(route, _)| route.irqchip.get());
    let differs = |other: &Route| match (other, chip) {
        (Route::Pin(pin), Some(chip)) => chip_of(*pin) != chip,
        _ => false,
    };
    others.iter().all(differs)
}

fn add(
    routes: &mut Routes,
    entry: &IrqRoutingEntry,
    kind: IrqchipKind,
    x2apic: bool,
) -> Result<()> {
    let known = match entry.kind.get() {
        route_type::MSI => MSI_VALID_DEVID,
        _ => 0,
    };
    ensure(entry.flags.get() & !known == 0, ENTRY_FLAGS)?;
    let gsi = entry.gsi.get();
    ensure(has_room(routes.of(gsi), entry), ONCE)?;
    let made = route(entry, kind, x2apic)?;
    routes.0.entry(gsi).or_default().push(made);
    Ok(())
}

/// `KVM_SET_GSI_ROUTING`: the table as a whole.
pub(crate) fn set_routes(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let head: IrqRouting = arg::read(process, argument, COPY)?;
    let (kind, x2apic) = (vm.lock().irqchip_kind(), vm.irq().has_x2apic_format());
    ensure(kind != IrqchipKind::None, IRQCHIP)?;
    let count = head.nr.get();
    ensure(u64::from(count) <= MAX_IRQ_ROUTES, COUNT)?;
    ensure(head.flags.get() == 0, FLAGS)?;
    let at = argument.wrapping_add(size_of::<IrqRouting>() as u64);
    let entries: Vec<IrqRoutingEntry> = arg::read_list(process, at, count as usize, ENTRIES)?;
    let in_range = |entry: &IrqRoutingEntry| u64::from(entry.gsi.get()) < MAX_IRQ_ROUTES;
    ensure(entries.iter().all(in_range), GSI)?;
    let mut routes = Routes::default();
    for entry in &entries {
        add(&mut routes, entry, kind, x2apic)?;
    }
    let irq = vm.irq();
    let mut state = irq.lock();
    state.routes = routes;
    state.tell_timer();
    Ok(0)
}
