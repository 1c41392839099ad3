//! `kvm-ops run --tech tdx`: runs a TD from a firmware image, on a host with a TDX module.

use std::fs;
use std::ops::Range;

use kvm_ops::{FreeReport, Gpa, Irqchip};
use kvm_ops_machine::{ConsoleSink, MachineConfig, RunLimits};

use kvm_ops_tdvf::Order;

use super::{Args, LaunchOrder, Terminal, homeless, refused, summary};
use crate::confidential::{Account, Books, Firmware, Leaks, MESSAGE, Start, TdImage, Tour};
use crate::doctor::text::{finish, table};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::hosts::{AnyMachine, Hosts, Needs, Place};
use crate::interrupt::Interrupt;
use crate::term;
use crate::units::plural;

/// The results of the steps, with the SEAMCALLs that the module counted.
struct Steps {
    books: Vec<Books>,
    rows: Vec<(&'static str, u64, String)>,
}

pub(super) fn run(args: &Args) -> Outcome {
    let image = image(args)?;
    let (tour, converted) = Tour::new(&image, args.memory).ok_or_else(|| {
        Failure::new(format!("{} leaves no memory for the guest", args.name()))
            .hint("give the TD more with --memory")
    })?;
    if image.low_end() > args.memory {
        return Err(Failure::new(format!(
            "{} has sections up to {:#x}, beyond the memory of {:#x} bytes",
            args.name(),
            image.low_end(),
            args.memory
        ))
        .hint("give the TD more with --memory"));
    }
    let interrupt = Interrupt::install()?;
    let hosts = Hosts::open(args.host);
    let irqchip = args.irqchip.unwrap_or(Irqchip::None);
    let place = hosts
        .place(args.host, Needs::Anything, args.tech, args.vcpus, irqchip)
        .map_err(|no_place| homeless(args, no_place))?;

    let mut steps = Steps::new(place);
    let config = MachineConfig::new()
        .kind(args.tech)
        .vcpus(args.vcpus)
        .memory(args.memory)
        .irqchip(irqchip);
    let (pages, extended) = (image.pages().len(), image.measured_pages());
    let start = Start::of_td(&image);
    let config = start.configure(config, args.memory, vec![Box::new(tour)]);
    let mut machine = place
        .host
        .build(config)
        .map_err(|error| refused("the TD cannot be built", error))?;
    interrupt.stops(machine.stopper());
    steps.took(
        place,
        "create, measure, finalise",
        format!("{pages} pages added, {extended} of them measured"),
    );
    let mrtd = start.measurement(place, machine.as_ref());
    let mrtd = mrtd
        .checked()
        .map_err(|why| Failure::because("MRTD is not that of the image", why));
    match &mrtd {
        Ok(mrtd) => steps.took(place, "compare MRTD", format!("{mrtd}, as off line")),
        Err(failure) => steps.took(place, "compare MRTD", failure.in_a_line()),
    }

    let code = if mrtd.is_ok() {
        let terminal = Terminal::new(machine.stopper());
        let console = ConsoleSink::writer(terminal.clone());
        let devices = machine.devices(console.clone());
        let ran = machine.run(&devices, RunLimits::none().deadline(args.timeout));
        terminal.finish();
        let code = summary(args, place, machine.as_ref(), ran, terminal.closed());
        let seen = match (&code, seen_by_host(machine.as_ref(), converted)) {
            (Ok(Code::Fine), false) => Err(Failure::new(
                "the host does not see what the guest wrote into shared memory",
            )
            .code(Code::Guest)),
            _ => Ok(()),
        };
        let detail = if seen.is_ok() && matches!(code, Ok(Code::Fine)) {
            "the host saw what the guest shared"
        } else {
            "the guest did not come to its end"
        };
        steps.took(place, "run", detail.into());
        seen.and(code)
    } else {
        mrtd.map(|_| Code::Fine)
    };
    interrupt.clear();
    let freed = machine.destroy();
    steps.took(
        place,
        "tear down",
        format!(
            "{} and {} freed",
            plural(freed.pages_freed, "page"),
            plural(freed.keys_freed.into(), "KeyID")
        ),
    );
    let clean = report(&steps, &freed);
    let code = code?;
    Ok(if clean { code } else { Code::Leak })
}

fn image(args: &Args) -> Result<TdImage, Failure> {
    let given = [
        (args.cmdline.is_some(), "--cmdline"),
        (args.initrd.is_some(), "--initrd"),
        (args.format.is_some(), "--format"),
    ];
    if let Some((_, option)) = given.into_iter().find(|(given, _)| *given) {
        return Err(Failure::new(format!("{option} has no meaning for a TD"))
            .hint("a TD starts with what the metadata of its firmware lists")
            .code(Code::Usage));
    }
    let order = match args.order.unwrap_or_default() {
        LaunchOrder::Single => Order::SinglePass,
        LaunchOrder::TwoPass => Order::TwoPass,
    };
    let Some(path) = &args.image else {
        return Ok(TdImage::built_in(order));
    };
    let image = fs::read(path).map_err(|error| {
        Failure::because(
            format!("the image {} cannot be read", path.display()),
            error,
        )
    })?;
    TdImage::parse(&image, order).map_err(|error| {
        Failure::because(
            format!("{} cannot be launched as a TD", path.display()),
            error,
        )
        .hint("`kvm-ops measure tdx IMAGE --sections` shows what an image has")
    })
}

/// Returns true if the host can read the guest's message in the memory that it shared.
fn seen_by_host(machine: &dyn AnyMachine, converted: Range<u64>) -> bool {
    let mut seen = [0; MESSAGE.len()];
    machine.read(Gpa::new(converted.start), &mut seen).is_ok() && seen == *MESSAGE
}

impl Steps {
    fn new(place: &Place) -> Self {
        Self {
            books: place.books(Firmware::TdxModule).into_iter().collect(),
            rows: Vec::new(),
        }
    }

    /// Records a step that is done.
    fn took(&mut self, place: &Place, step: &'static str, detail: String) {
        let Some(now) = place.books(Firmware::TdxModule) else {
            self.rows.push((step, 0, detail));
            return;
        };
        let calls = self
            .books
            .last()
            .map_or(0, |before| now.seamcalls_since(before));
        self.rows.push((step, calls, detail));
        self.books.push(now);
    }
}

/// Prints the steps and the account. Returns true if nothing leaked and every sum agrees.
fn report(steps: &Steps, freed: &FreeReport) -> bool {
    let mut shown = table(&["STEP", "SEAMCALLS", ""]);
    for (step, calls, detail) in &steps.rows {
        shown.add_row([*step, &calls.to_string(), detail]);
    }
    term::complain(format!("\n{}", finish(shown)));
    for leak in &freed.leaks {
        term::complain(leak);
    }
    let (Some(before), Some(after)) = (steps.books.first(), steps.books.last()) else {
        return freed.is_clean();
    };
    let mut leaks = Leaks::default();
    leaks.add(freed);
    let account = Account::draw(Firmware::TdxModule, before, after, leaks);
    term::complain(format!("\n{account}"));
    freed.is_clean() && account.disagreements.is_empty()
}
