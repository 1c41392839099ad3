//! The replay of one transcript.

use super::event::{
    exit_status, lock_target, recorded_event, registers, registers_over, show_event, vm_exit,
};
use super::json::{Object, Parsed, narrow, numbers};
use super::{Coverage, FirstDifference, Options, check, platform};
use crate::faults::{Fault, KeyEngineFault};
use crate::guest::{GuestEvent, GuestFlow};
use crate::platform::{Flow, Platform};
use crate::status::Status;
use crate::vcpu::Event;
use serde_json::Value;

/// Distance by which a guest's RIP moves from one event to the next unless the line says otherwise.
const RIP_ADVANCE: u64 = 0x40;
/// Memory a line may write or check.
pub(super) const MAX_LEN: u64 = 1 << 30;

/// A line that fails: a value differs, or the line makes no sense.
pub(super) enum Failure {
    Differs { expected: String, got: String },
    Malformed(String),
}

impl From<String> for Failure {
    fn from(e: String) -> Self {
        Failure::Malformed(e)
    }
}

impl From<crate::platform::LpError> for Failure {
    fn from(e: crate::platform::LpError) -> Self {
        Failure::Differs {
            expected: "the call to execute".into(),
            got: e.to_string(),
        }
    }
}

pub(super) type Played = Result<(), Failure>;

pub(super) fn same<T: PartialEq + std::fmt::Debug>(what: &str, expected: &T, got: &T) -> Played {
    if expected == got {
        return Ok(());
    }
    Err(Failure::Differs {
        expected: format!("{what} {expected:x?}"),
        got: format!("{what} {got:x?}"),
    })
}

pub(super) fn replay(
    text: &[u8],
    options: Options,
    coverage: &mut Coverage,
) -> Result<(), FirstDifference> {
    let mut lines = text.split(|b| *b == b'\n').enumerate();
    let difference = |i: usize, line: &[u8], f: Failure| {
        let (expected, got) = match f {
            Failure::Differs { expected, got } => (expected, got),
            Failure::Malformed(e) => ("a well-formed line".into(), e),
        };
        let text = String::from_utf8_lossy(line).into_owned();
        FirstDifference {
            line: i + 1,
            text,
            expected,
            got,
        }
    };
    let (_, first) = lines.next().unwrap_or_default();
    let platform =
        platform::build(first, options).map_err(|e| difference(0, first, Failure::Malformed(e)))?;
    let mut player = Player {
        p: platform,
        coverage,
    };
    for (i, line) in lines {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        player.line(line).map_err(|f| difference(i, line, f))?;
    }
    Ok(())
}

struct Player<'a> {
    p: Platform,
    coverage: &'a mut Coverage,
}

impl Player<'_> {
    fn line(&mut self, line: &[u8]) -> Played {
        let mut o = Object::parse(line)?;
        match o.string("kind")?.as_str() {
            "mem" => self.mem(o),
            "seamcall" => self.seamcall(o),
            "tdcall" => self.tdcall(o),
            "vmexit" => self.vmexit(o),
            "inject" => self.inject(o),
            "hold" => {
                let (target, mode) = lock_target(&mut o)?;
                o.done()?;
                same("the lock is taken:", &true, &self.p.hold(target, mode))
            }
            "release" => {
                let (target, mode) = lock_target(&mut o)?;
                o.done()?;
                self.p.release(target, mode);
                Ok(())
            }
            "check" => check::check(&self.p, o),
            "note" => {
                o.take("text");
                Ok(o.done()?)
            }
            other => Err(format!("unknown kind {other}").into()),
        }
    }

    fn mem(&mut self, mut o: Object) -> Played {
        let pa = o.number("pa")?;
        let len = |o: &mut Object| -> Parsed<usize> {
            match o.number("len")? {
                n @ ..=MAX_LEN => narrow(n),
                n => Err(format!("length {n:#x} is too large")),
            }
        };
        let data = if let Some(words) = o.take("u64") {
            let words = numbers(super::json::array(words)?)?;
            words.iter().flat_map(|w| w.to_le_bytes()).collect()
        } else if let Some(Value::String(hex)) = o.take("hex") {
            hex::decode(hex).map_err(|e| e.to_string())?
        } else if let Some(Value::String(fill)) = o.take("fill") {
            let byte = u8::from_str_radix(&fill, 16).map_err(|e| e.to_string())?;
            vec![byte; len(&mut o)?]
        } else {
            let seed = o.number("pattern")?;
            let byte = |i: u64| (seed.wrapping_add(7 * i).wrapping_add(13 * (i >> 8))) as u8;
            (0..len(&mut o)? as u64).map(byte).collect()
        };
        o.done()?;
        let at = self.p.config().strip(pa);
        self.p
            .poke_memory(at, &data)
            .map_err(|e| e.to_string().into())
    }

    fn seamcall(&mut self, mut o: Object) -> Played {
        let lp = narrow(o.number("lp")?)?;
        let name = o.string("name")?;
        let input = registers(o.need("in")?)?;
        let repeat = o.number_or("repeat", 1)?;
        o.take("status");
        for _ in 1..repeat {
            let mut regs = input;
            let flow = self.p.seamcall_step(lp, &mut regs)?;
            same("repeated outcome", &Flow::Returned(Status::SUCCESS), &flow)?;
            self.coverage.add(&name, "TDX_SUCCESS");
        }
        let mut regs = input;
        let flow = self.p.seamcall_step(lp, &mut regs)?;
        if o.take("result").is_some() {
            let expected = registers(o.need("guest")?)?;
            let injected = recorded_event(o.take("injected"))?;
            let vm = o.number_or("vm", 0)?;
            o.done()?;
            let Flow::Entered {
                guest,
                injected: got,
                vm: got_vm,
            } = flow
            else {
                return Err(Failure::Differs {
                    expected: "entered".into(),
                    got: format!("{} {regs:?}", Status(regs.rax)),
                });
            };
            same("guest", &expected, &guest)?;
            self.coverage
                .add(&name, &format!("entered{}", vector_suffix(got)));
            same("injected", &injected, &show_event(got))?;
            return same("vm", &vm, &u64::from(got_vm));
        }
        let expected = registers_over(o.need("out")?, input)?;
        o.done()?;
        if let Flow::Entered { guest, .. } = flow {
            return Err(Failure::Differs {
                expected: format!("{} {expected:?}", Status(expected.rax)),
                got: format!("entered {guest:?}"),
            });
        }
        let exit = input.rax & 0xFFFF == 0 && regs.rax != 0 && !Status(regs.rax).is_error();
        let status = Status(regs.rax);
        let status = if exit {
            exit_status(status)
        } else {
            status.to_string()
        };
        self.coverage.add(&name, &status);
        same(&status, &expected, &regs)
    }

    fn tdcall(&mut self, mut o: Object) -> Played {
        let name = o.string("name")?;
        let mode_64bit = o.number_or("mode", 64)? != 32;
        let event = GuestEvent::Tdcall { mode_64bit };
        self.guest(o, &name, event, RIP_ADVANCE)
    }

    fn vmexit(&mut self, mut o: Object) -> Played {
        let exit = vm_exit(&mut o)?;
        let name = format!("VMEXIT.{}", exit.reason);
        let advance = if exit.reason == 48 { 0 } else { RIP_ADVANCE };
        self.guest(o, &name, GuestEvent::Exit(exit), advance)
    }

    fn guest(&mut self, mut o: Object, name: &str, event: GuestEvent, advance: u64) -> Played {
        let lp = narrow(o.number("lp")?)?;
        let input = registers(o.need("in")?)?;
        let advance = o.number_or("advance", advance)?;
        let status = o.take("status");
        let result = o.string("result")?;
        let flow = self.p.guest_event(lp, input, event, advance)?;
        match (result.as_str(), flow) {
            (
                "resume",
                GuestFlow::Resume {
                    guest,
                    injected,
                    vm: got_vm,
                    completed,
                },
            ) => {
                let vm = o.number_or("vm", 0)?;
                let expected = registers(o.need("guest")?)?;
                let expected_event = recorded_event(o.take("injected"))?;
                o.done()?;
                let is_tdcall = matches!(event, GuestEvent::Tdcall { .. });
                // In an L2 VM the registers are its, and hold no status.
                let repeats = is_tdcall && injected.is_none() && !completed && vm == 0;
                let outcome = match (injected, is_tdcall) {
                    (Some(_), _) => format!("injected{}", vector_suffix(injected)),
                    (None, true) if vm != 0 => "entered".into(),
                    (None, false) => "resumed".into(),
                    (None, true) if repeats => "not_completed".into(),
                    (None, true) => Status(guest.rax).to_string(),
                };
                self.coverage.add(name, &outcome);
                same("guest", &expected, &guest)?;
                same("injected", &expected_event, &show_event(injected))?;
                same("vm", &vm, &u64::from(got_vm))?;
                let recorded_repeat = status == Some(Value::String("NOT_COMPLETED".into()));
                same("to be repeated:", &recorded_repeat, &repeats)
            }
            ("exit", GuestFlow::Exit { host }) => {
                let expected = registers(o.need("out")?)?;
                o.done()?;
                let status = exit_status(Status(host.rax));
                self.coverage.add(&format!("{name}>TDEXIT"), &status);
                same(&status, &expected, &host)
            }
            (expected, got) => Err(Failure::Differs {
                expected: format!("{expected} {:?} {:?}", o.take("out"), o.take("guest")),
                got: format!("{got:?}"),
            }),
        }
    }

    fn inject(&mut self, mut o: Object) -> Played {
        let what = o.string("what")?;
        match what.as_str() {
            "intr" | "rflags_if" => {
                let (lp, value) = (narrow(o.number("lp")?)?, o.number("value")?);
                match what.as_str() {
                    "intr" => self.p.set_pending(lp, narrow(value)?),
                    _ => self.p.set_interrupts_enabled(lp, value != 0),
                }
            }
            "pconfig" => {
                let outcome = match o.string("outcome")?.as_str() {
                    "entropy" => KeyEngineFault::Entropy,
                    "busy" => KeyEngineFault::Busy,
                    other => return Err(format!("unknown outcome {other}").into()),
                };
                let count = narrow(o.number("count")?)?;
                self.p.inject(Fault::KeyEngine { outcome, count });
            }
            "rdrand_fail" => {
                self.p.inject(Fault::Rdrand {
                    count: narrow(o.number("count")?)?,
                });
            }
            "rdseed_fail" => {
                self.p.inject(Fault::Rdseed {
                    count: narrow(o.number("count")?)?,
                });
            }
            "tsc_adjust" => self.p.inject(Fault::TscAdjust(o.number("value")?)),
            "limit_cpuid_maxval" => {
                self.p
                    .inject(Fault::LimitCpuidMaxval(o.number("value")? != 0));
            }
            "tsc_add" => self.p.inject(Fault::TscAdd(o.number("value")? as i64)),
            other => return Err(format!("unknown injection {other}").into()),
        }
        Ok(o.done()?)
    }
}

fn vector_suffix(event: Option<Event>) -> String {
    event.map_or_else(String::new, |e| format!("|#{}", e.vector))
}
