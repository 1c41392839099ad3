//! A migration TD that reads and writes migration keys as the test says.

use std::sync::{Arc, Mutex};

use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
use kvm_ops_core::{Backend, Exit, VcpuId, VcpuOps, VmId, VmOps, VmParams};
use kvm_ops_tdx::migrate::Binding;

use super::{Vcpu, Vm};
use crate::common::TestHost;
use crate::common::life::destroy;

const SERVTD_RD: u64 = 18;
const SERVTD_WR: u64 = 20;
/// Fields of four elements.
const MIG_DEC_KEY: u64 = 0x9810_0003_0000_0010;
const MIG_ENC_KEY: u64 = 0x9810_0003_0000_0018;
const DONE_PORT: u16 = 0x70;

/// A migration TD.
pub struct Keeper {
    vcpu: Vcpu,
    pub vm: Vm,
}

/// TDCALLs, one after the other, and RAX and R8 of each; then a byte to a port.
struct Calls {
    calls: Vec<[u64; 9]>,
    answers: Arc<Mutex<Vec<[u64; 2]>>>,
}

impl GuestProgram for Calls {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        if let Outcome::Values([rax, _, _, r8, ..]) = last {
            self.answers.lock().unwrap().push([rax, r8]);
        }
        match self.calls.pop() {
            Some([leaf, args @ ..]) => Action::TdcallWith { leaf, args },
            None => Action::Out {
                port: DONE_PORT,
                data: &[1],
            },
        }
    }
}

impl Keeper {
    pub fn new(host: &TestHost) -> Self {
        let mut vm = Vm::create(host, VmId(100), &VmParams::new(1)).unwrap();
        vm.vm_init().unwrap();
        let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        vm.vm_finalize().unwrap();
        Self { vcpu, vm }
    }

    fn run(&mut self, mut calls: Vec<[u64; 9]>) -> Vec<[u64; 2]> {
        calls.reverse();
        let answers = Arc::default();
        let program = Calls {
            calls,
            answers: Arc::clone(&answers),
        };
        let programs = self.vcpu.programs().unwrap();
        programs.load_program(Box::new(program)).unwrap();
        let exit = self.vcpu.vcpu_run().unwrap();
        assert!(
            matches!(
                exit,
                Exit::IoOut {
                    port: DONE_PORT,
                    ..
                }
            ),
            "{exit:?}"
        );
        answers.lock().unwrap().clone()
    }

    fn call(binding: Binding, leaf: u64, field: u64, value: u64) -> [u64; 9] {
        let [a, b, c, d] = binding.uuid;
        let handle = binding.handle;
        [leaf, handle, field, value, u64::MAX, a, b, c, d]
    }

    /// A new key with which a TD encrypts.
    pub fn read_key(&mut self, of: Binding) -> [u64; 4] {
        let calls = (0..4).map(|n| Self::call(of, SERVTD_RD, MIG_ENC_KEY + n, 0));
        let answers = self.run(calls.collect());
        let words: Vec<u64> = answers
            .iter()
            .map(|[rax, r8]| {
                assert_eq!(rax >> 63, 0, "{rax:#x}");
                *r8
            })
            .collect();
        words.try_into().unwrap()
    }

    /// Sets the key with which a TD decrypts.
    pub fn write_key(&mut self, of: Binding, key: [u64; 4]) {
        let words = (0..).zip(key);
        let calls = words.map(|(n, word)| Self::call(of, SERVTD_WR, MIG_DEC_KEY + n, word));
        for [rax, _] in self.run(calls.collect()) {
            assert_eq!(rax >> 63, 0, "{rax:#x}");
        }
    }

    pub fn destroy(self) {
        drop(self.vcpu);
        assert!(destroy(self.vm).is_clean());
    }
}
