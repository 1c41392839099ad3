//! Tests both forms of each guest against the table, without a platform.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use kvm_ops::guest::{Action, Outcome};
use kvm_ops::{SharedMask, VcpuId};

use super::*;

/// The bytes that the guest `crc32` writes, computed independently.
fn sequence() -> Vec<u8> {
    let next = |x: &u32| Some(x.wrapping_mul(1_103_515_245).wrapping_add(12345));
    std::iter::successors(Some(1), next)
        .skip(1)
        .take(1024)
        .map(|x| x.to_le_bytes()[2])
        .collect()
}

#[test]
fn the_expected_results_are_what_others_compute() {
    assert_eq!(CRC, crc32fast::hash(&sequence()));
    let primes = (2..8192u32).filter(|n| (2..*n).take_while(|d| d * d <= *n).all(|d| n % d != 0));
    assert_eq!(find("sieve").unwrap().result, Some(primes.count() as u32));
    let mut state = 0u32;
    let sum = (1..=16u32).fold(0u32, |sum, round| {
        state = state.rotate_left(5) ^ round.wrapping_mul(0x9e37_79b9);
        sum.wrapping_add(state)
    });
    assert_eq!(MIXED, sum);
}

/// Runs the programs of a guest in turns over a byte array, as a platform would.
#[test]
fn guest_programs_report_the_expected_results() {
    for guest in &ALL {
        let mut memory: BTreeMap<u64, u8> = BTreeMap::new();
        let mixer = Mixer::default();
        let (mut console, mut result) = (Vec::new(), None);
        let mut programs: Vec<_> = (guest.programs)().into_iter().map(Some).collect();
        assert_eq!(programs.len(), guest.vcpus as usize);
        let mut answers: Vec<Option<Vec<u8>>> = vec![None; programs.len()];
        let mut started = vec![false; programs.len()];
        let mut end = None;
        for round in 0.. {
            if end.is_some() {
                break;
            }
            // No built-in guest takes this long.
            if round == 100_000 {
                end = Some(WantedEnd::Timeout);
            }
            assert!(
                programs.iter().any(Option::is_some),
                "{} ended silently",
                guest.name
            );
            for id in 0..programs.len() {
                let Some(program) = &mut programs[id] else {
                    continue;
                };
                let answer = answers[id].take();
                let last = match &answer {
                    _ if !started[id] => Outcome::Start {
                        vcpu: VcpuId(id as u32),
                        mask: SharedMask::NONE,
                    },
                    Some(data) => Outcome::Data(data),
                    None => Outcome::Done,
                };
                started[id] = true;
                match program.step(last) {
                    Action::Read { gpa, len } => {
                        let mut data = vec![0; len];
                        if !mixer.read(gpa, &mut data) {
                            for (at, byte) in (gpa.get()..).zip(&mut data) {
                                *byte = memory.get(&at).copied().unwrap_or(0);
                            }
                        }
                        answers[id] = Some(data);
                    }
                    Action::Write { gpa, data } => {
                        if !mixer.write(gpa, data) {
                            assert!(gpa.get() + data.len() as u64 <= guest.memory);
                            memory.extend((gpa.get()..).zip(data.iter().copied()));
                        }
                    }
                    Action::Out { port, data } => match port {
                        SERIAL_PORT => console.extend_from_slice(data),
                        RESULT_PORT => result = Some(u32::from_le_bytes(data.try_into().unwrap())),
                        EXIT_PORT => end = Some(WantedEnd::DebugExit),
                        port => panic!("port {port:#x}"),
                    },
                    Action::Halt => end = Some(WantedEnd::Halt),
                    Action::Shutdown => programs[id] = None,
                    action => panic!("{action:?}"),
                }
            }
        }
        assert_eq!(String::from_utf8(console).unwrap(), guest.console);
        assert_eq!(result, guest.result, "{}", guest.name);
        assert_eq!(end, Some(guest.end), "{}", guest.name);
    }
}

/// Writes the bytes instead if `BLESS` is set in the environment.
#[test]
fn the_machine_code_is_what_its_source_assembles_to() {
    let run = |program: &str, args: &[&str]| {
        Command::new(program)
            .args(args)
            .status()
            .map(|status| assert!(status.success(), "{program} {args:?}: {status}"))
    };
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
    let temp = std::env::temp_dir().join(format!("kvm-ops-guests-{}", std::process::id()));
    std::fs::create_dir_all(&temp).unwrap();
    for guest in &ALL {
        let source = sources.join(format!("{}.s", guest.name));
        let [object, bytes] = ["o", "bin"].map(|ext| temp.join(guest.name).with_extension(ext));
        let [source, object, bytes] =
            [&source, &object, &bytes].map(|path| path.to_str().expect("a UTF-8 path"));
        let built = run("as", &["--32", "-o", object, source]).and_then(|()| {
            let link = [
                "-m",
                "elf_i386",
                "-Ttext",
                "0x7c00",
                "--oformat",
                "binary",
                "-o",
            ];
            run("ld", &[&link[..], &[bytes, object]].concat())
        });
        if let Err(error) = built {
            println!("skipped: GNU as and ld for x86 are needed: {error}");
            break;
        }
        if std::env::var_os("BLESS").is_some() {
            std::fs::copy(bytes, sources.join(format!("{}.bin", guest.name))).unwrap();
        } else {
            assert!(
                std::fs::read(bytes).unwrap() == guest.code,
                "{}.bin is not what {}.s assembles to; write it with BLESS=1",
                guest.name,
                guest.name
            );
        }
    }
    std::fs::remove_dir_all(&temp).unwrap();
}
