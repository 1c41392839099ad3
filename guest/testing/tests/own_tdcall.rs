//! A kernel that has its own wrapper of TDCALL.

use kvm_ops_guest_test::tdx::{Reply, TestTd, Vcpu, hosts, tdcall};

/// Its wrapper takes the registers in encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
struct Kernel {
    tdcall: fn(&mut [u64; 16]),
}

impl Kernel {
    /// TDG.MEM.PAGE.ACCEPT of a 4 KiB page.
    fn accept(&self, page: u64) -> Result<(), u64> {
        let mut registers = [6, page, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        (self.tdcall)(&mut registers);
        if registers[0] == 0 {
            Ok(())
        } else {
            Err(registers[0])
        }
    }

    /// TDG.VP.VMCALL<MapGPA>. This kernel forgets that a host may answer RETRY.
    fn map_gpa(&self, gpa: u64, bytes: u64) -> u64 {
        let mut registers = [
            0, 0xfc00, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10001, gpa, bytes, 0, 0,
        ];
        (self.tdcall)(&mut registers);
        registers[10]
    }
}

#[test]
fn the_kernel_accepts_a_page() {
    let td = TestTd::builder().pending(0x8000..0x9000).build().unwrap();
    let read = td.run(|cpu: &mut Vcpu| {
        Kernel { tdcall }.accept(0x8000).unwrap();
        cpu.read(0x8000, 4)
    });
    assert_eq!(read.unwrap().unwrap(), [0; 4]);
}

#[test]
fn the_kernel_meets_a_host_that_stops_halfway() {
    let td = TestTd::builder()
        .host(hosts::partial_map_gpa(0x1000))
        .build()
        .unwrap();
    let answer = td.run(|_| Kernel { tdcall }.map_gpa(1 << 47 | 0x8000, 0x2000));
    assert_eq!(answer.unwrap(), 1, "RETRY, and a page that is not shared");
    assert!(!td.hypervisor().is_shared(0x9000));
}

#[test]
fn the_kernel_ends_with_a_host_that_does_not() {
    let td = TestTd::builder().host(|_, _| Reply::Stop).build().unwrap();
    let stopped = td
        .run(|_| Kernel { tdcall }.map_gpa(0x8000, 0x1000))
        .unwrap_err();
    let message = "vcpu 0 stopped: the host does not enter it again after: \
                   MapGPA of 0x1000 bytes at 0x8000";
    assert_eq!(stopped.to_string(), message);
}
