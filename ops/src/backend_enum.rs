//! The text of the two traits, and the macro that declares an enum of back ends.
//!
//! enum_dispatch links a trait and an enum by name within one crate only, because it keeps the
//! trait's tokens in a table of the running compiler. So the macro repeats the traits as decoys in
//! a hidden module of the calling crate, in the same expansion as the enum; the generated `impl`
//! names the bare trait, which resolves to the real one. This file is the single source of both.
//! Rules that follow, each found by breaking it: no `$crate` in the trait text (the tokens are
//! turned into a string), `#[enum_dispatch(..)]` must be the caller's own tokens (hygiene), and
//! the decoys come before the enums.

/// Declares an enum of back ends and the enum of their vCPUs, and implements
/// [`VmOps`](crate::VmOps), [`VcpuOps`](crate::VcpuOps) and [`Backend`](crate::Backend) for them
/// by a `match`. Several such pairs may stand one after the other; `#![cfg(..)]` before a pair
/// holds for both of its enums. An enum may be a back end of another one. That is how more than
/// three back ends are best declared, vendor first (`Intel(IntelVm), Amd(AmdVm)`): LLVM turns a
/// `match` of four arms into a jump table, an indirect branch after all (docs/benchmarks.md).
///
/// Call it once in a crate: enum_dispatch would implement the traits again for the enums of an
/// earlier call.
///
/// `VmOps`, `VcpuOps` and `enum_dispatch` must be in scope, and the library be known as `kvm_ops`
/// (a renamed dependency: `extern crate my_name as kvm_ops`). Both enums have the same variants,
/// with the same `#[cfg]`s; each variant's vCPU is `<Variant as Backend>::Vcpu`.
///
/// ```
/// extern crate kvm_ops_core as kvm_ops;
/// use kvm_ops::kit::{NullVcpu, NullVm};
/// use kvm_ops::{Tech, VcpuOps, VmId, VmOps, backend_enum, enum_dispatch};
///
/// backend_enum! {
///     #[enum_dispatch(VmOps)]
///     pub enum MyVm { Null(NullVm) }
///
///     #[enum_dispatch(VcpuOps)]
///     pub enum MyVcpu { Null(NullVcpu) }
/// }
///
/// let vm: MyVm = NullVm::new(VmId(7)).into();
/// assert_eq!(vm.id(), VmId(7));
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! backend_enum {
    ($(
        $(#![cfg($cfg:meta)])?

        $(#[$vm_meta:meta])*
        $vm_vis:vis enum $Vm:ident $(<$VmH:ident : $VmB:path>)? {
            $( $(#[$vm_attr:meta])* $VmV:ident($VmT:ty) ),+ $(,)?
        }

        $(#[$vcpu_meta:meta])*
        $vcpu_vis:vis enum $Vcpu:ident $(<$VcpuH:ident : $VcpuB:path>)? {
            $( $(#[$vcpu_attr:meta])* $VcpuV:ident($VcpuT:ty) ),+ $(,)?
        }
    )+) => {
        $crate::backend_enum! {
            @traits [#[doc(hidden)] #[allow(dead_code, missing_docs, unreachable_pub)]]
            [#[::kvm_ops::enum_dispatch]] mod __kvm_ops_decoys;

            $(
                $(#[cfg($cfg)])?
                $(#[$vm_meta])*
                $vm_vis enum $Vm $(<$VmH: $VmB>)? {
                    $( $(#[$vm_attr])* #[allow(missing_docs)] $VmV($VmT) ),+
                }

                $(#[cfg($cfg)])?
                $(#[$vcpu_meta])*
                $vcpu_vis enum $Vcpu $(<$VcpuH: $VcpuB>)? {
                    $( $(#[$vcpu_attr])* #[allow(missing_docs)] $VcpuV($VcpuT) ),+
                }

                $(#[cfg($cfg)])?
                impl $(<$VmH: $VmB>)? ::kvm_ops::Backend for $Vm $(<$VmH>)? {
                    type Vcpu = $Vcpu $(<$VmH>)?;

                    #[inline]
                    fn create_vcpu(&self, id: ::kvm_ops::VcpuId) -> ::kvm_ops::Result<Self::Vcpu> {
                        match self {
                            $(
                                $(#[$vm_attr])*
                                Self::$VmV(vm) => {
                                    ::kvm_ops::Backend::create_vcpu(vm, id).map($Vcpu::$VmV)
                                }
                            )+
                        }
                    }
                }
            )+
        }
    };

    (@traits [$($mod_attr:tt)*] [$($attr:tt)*] $vis:vis mod $name:ident; $($rest:tt)*) => {
        $($mod_attr)*
        $vis mod $name {
            /// What every back end answers for a VM.
            ///
            /// `&mut self` and `self` are steps of the VM's life, which are alone; `&self` is what
            /// several vCPUs do at once. Each operation that a technology may lack has a default
            /// that answers [`Error::NoOp`](::kvm_ops::Error::NoOp) and names the operation.
            ///
            /// The order of a life: [`vm_init`](Self::vm_init), slots, vCPUs and initial pages,
            /// [`vm_finalize`](Self::vm_finalize), running, then the teardown, whose order the
            /// tokens enforce: [`mmu_release_hkid`](Self::mmu_release_hkid),
            /// [`drain_private`](Self::drain_private), [`vm_free`](Self::vm_free).
            $($attr)*
            pub trait VmOps: Send + Sync {
                /// The technology that holds this VM.
                fn tech(&self) -> ::kvm_ops::Tech;

                /// The VM's number, unique on its host.
                fn id(&self) -> ::kvm_ops::VmId;

                /// Where the VM is in its life.
                fn step(&self) -> ::kvm_ops::Step;

                /// Which bit of a GPA tells private from shared. Constant for a VM's life: read it
                /// once and keep it.
                fn shared_mask(&self) -> ::kvm_ops::SharedMask {
                    ::kvm_ops::SharedMask::NONE
                }

                /// Sets the VM's parameters (`vm_init` in main.c). `Created -> Initialized`.
                ///
                /// # Errors
                /// [`Error::WrongState`](::kvm_ops::Error::WrongState) unless the VM is just
                /// created; what the technology refuses.
                fn vm_init(&mut self) -> ::kvm_ops::Result<()>;

                /// Closes the VM's initial contents, so that it may run (TDH.MR.FINALIZE,
                /// LAUNCH_FINISH). `Initialized -> Runnable`.
                ///
                /// # Errors
                /// [`Error::WrongState`](::kvm_ops::Error::WrongState) unless initialised.
                fn vm_finalize(&mut self) -> ::kvm_ops::Result<()>;

                /// Adds a page to the VM's measured start. After `vm_init`, before `vm_finalize`.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for an address that the VM cannot
                /// have.
                fn add_initial_page(
                    &mut self,
                    page: &::kvm_ops::InitialPage<'_>,
                ) -> ::kvm_ops::Result<()> {
                    let _ = page;
                    ::kvm_ops::unsupported!("add_initial_page")
                }

                /// Measures the contents of an initial page that was added
                /// [`Unmeasured`](::kvm_ops::InitialPageKind::Unmeasured), for launches that add
                /// several pages before they measure them (TDH.MR.EXTEND of each 256 bytes).
                ///
                /// # Errors
                /// [`Error::NotFound`](::kvm_ops::Error::NotFound) where no such page is.
                fn measure_initial_page(&mut self, gpa: ::kvm_ops::Gpa) -> ::kvm_ops::Result<()> {
                    let _ = gpa;
                    ::kvm_ops::unsupported!("measure_initial_page")
                }

                /// First step of the teardown: gives the VM's memory key back (`vm_pre_destroy` in
                /// main.c, `tdx_mmu_release_hkid`). No vCPU runs afterwards. Allowed from every
                /// step but those after it.
                ///
                /// # Errors
                /// Where firmware keeps the key: then nothing of the VM can be reclaimed, and the
                /// VM is [`Poisoned`](::kvm_ops::Step::Poisoned).
                fn mmu_release_hkid(&mut self) -> ::kvm_ops::Result<::kvm_ops::KeyReleased>;

                /// Second step: gives every private page and every private page table back, each
                /// counted in the report of `vm_free` as freed or leaked.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for another VM's token. The token
                /// comes back with every error, so that its own VM can still be torn down.
                fn drain_private(
                    &mut self,
                    released: ::kvm_ops::KeyReleased,
                ) -> ::kvm_ops::Result<
                    ::kvm_ops::Drained,
                    (::kvm_ops::Error, ::kvm_ops::KeyReleased),
                >;

                /// Last step (`vm_destroy` in main.c): gives the VM itself back, and tells what
                /// could not be. A foreign token leaks the whole VM, and the report says so.
                fn vm_free(self, drained: ::kvm_ops::Drained) -> ::kvm_ops::FreeReport
                where
                    Self: Sized;

                /// The teardown's other end, when the key could not be released
                /// ([`mmu_release_hkid`](Self::mmu_release_hkid) failed with `error`): firmware keeps
                /// the VM. Nothing is freed, and the report lists all that is leaked.
                fn vm_abandon(self, error: ::kvm_ops::Error) -> ::kvm_ops::FreeReport
                where
                    Self: Sized,
                {
                    let report = ::kvm_ops::FreeReport::abandoned(self.id(), self.tech(), error);
                    // Its drop might free what firmware still uses.
                    ::core::mem::forget(self);
                    report
                }

                /// Gives one private page back after the key is gone (TDH.PHYMEM.PAGE.RECLAIM).
                ///
                /// # Errors
                /// What firmware answers; the page is leaked then.
                fn reclaim_private_page(
                    &mut self,
                    released: &::kvm_ops::KeyReleased,
                    page: ::kvm_ops::Pfn,
                    level: ::kvm_ops::Level,
                ) -> ::kvm_ops::Result<()> {
                    let _ = (released, page, level);
                    ::kvm_ops::unsupported!("reclaim_private_page")
                }

                /// Carries one change of a private table entry over to the Secure-EPT or the RMP
                /// (`set_external_spte` in Linux). The mirror holds the entry frozen meanwhile.
                ///
                /// # Errors
                /// [`Error::Busy`](::kvm_ops::Error::Busy): nothing changed, the entry goes back
                /// to what it was. Any other error: as documented by the back end.
                fn set_private_spte(&self, change: &::kvm_ops::SpteChange) -> ::kvm_ops::Result<()> {
                    let _ = change;
                    ::kvm_ops::unsupported!("set_private_spte")
                }

                /// Makes every vCPU forget blocked translations (TDH.MEM.TRACK and a kick). Once
                /// for a whole range of blocked entries.
                ///
                /// # Errors
                /// What firmware answers; blocked pages may not be removed then.
                fn flush_private_tlb(&self) -> ::kvm_ops::Result<()> {
                    ::kvm_ops::unsupported!("flush_private_tlb")
                }

                /// Makes a range of guest frames private or shared (`KVM_SET_MEMORY_ATTRIBUTES`), and
                /// takes out of use what maps it otherwise. The contents of what is taken out are
                /// gone. Answers how many pages were done: all of them, or fewer where the caller
                /// should look for pending work and go on from there.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for a range that is empty, wraps or
                /// leaves the guest's address space; nothing changed then.
                fn set_memory_attributes(
                    &self,
                    first: ::kvm_ops::Gfn,
                    pages: u64,
                    to: ::kvm_ops::Privacy,
                ) -> ::kvm_ops::Result<u64> {
                    let _ = (first, pages, to);
                    ::kvm_ops::unsupported!("set_memory_attributes")
                }

                /// Maps private memory before the guest touches it (`KVM_PRE_FAULT_MEMORY`).
                /// Answers how many pages were done.
                ///
                /// # Errors
                /// [`Error::NotFound`](::kvm_ops::Error::NotFound) where no slot or no private
                /// memory is; what the technology answers otherwise. Pages before it stay mapped.
                fn pre_fault_memory(
                    &self,
                    first: ::kvm_ops::Gfn,
                    pages: u64,
                ) -> ::kvm_ops::Result<u64> {
                    let _ = (first, pages);
                    ::kvm_ops::unsupported!("pre_fault_memory")
                }

                /// The largest page that may map this memory (`gmem_max_mapping_level`).
                fn gmem_max_mapping_level(
                    &self,
                    page: ::kvm_ops::Pfn,
                    privacy: ::kvm_ops::Privacy,
                ) -> ::kvm_ops::Level {
                    let _ = (page, privacy);
                    ::kvm_ops::Level::Size1G
                }

                /// Runs a technology's own command on the VM (`mem_enc_ioctl`;
                /// `KVM_MEMORY_ENCRYPT_OP`).
                ///
                /// # Errors
                /// What the command says; its structure holds the firmware's status.
                fn mem_enc_op(&mut self, cmd: &mut ::kvm_ops::EncCmd<'_>) -> ::kvm_ops::Result<()> {
                    let _ = cmd;
                    ::kvm_ops::unsupported!("mem_enc_op")
                }

                /// Declares memory that will hold encrypted data
                /// (`KVM_MEMORY_ENCRYPT_REG_REGION`).
                ///
                /// # Errors
                /// What the technology refuses.
                fn mem_enc_register_region(
                    &mut self,
                    region: ::kvm_ops::EncRegion,
                ) -> ::kvm_ops::Result<()> {
                    let _ = region;
                    ::kvm_ops::unsupported!("mem_enc_register_region")
                }

                /// Takes a declaration back (`KVM_MEMORY_ENCRYPT_UNREG_REGION`).
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid), as in Linux, for a range that is not
                /// declared exactly so.
                fn mem_enc_unregister_region(
                    &mut self,
                    region: ::kvm_ops::EncRegion,
                ) -> ::kvm_ops::Result<()> {
                    let _ = region;
                    ::kvm_ops::unsupported!("mem_enc_unregister_region")
                }

                /// Gives the encryption context away, or a second handle to it
                /// (`vm_move_enc_context_from`, `vm_copy_enc_context_from`, the source's half).
                ///
                /// # Errors
                /// What the technology refuses; nothing changed.
                fn release_enc_context(
                    &mut self,
                    transfer: ::kvm_ops::EncTransfer,
                ) -> ::kvm_ops::Result<::kvm_ops::EncContext> {
                    let _ = transfer;
                    ::kvm_ops::unsupported!("release_enc_context")
                }

                /// Takes an encryption context over (the destination's half).
                ///
                /// # Errors
                /// The reason, with the context, which the caller gives back to its source.
                fn adopt_enc_context(
                    &mut self,
                    context: ::kvm_ops::EncContext,
                ) -> ::kvm_ops::Result<(), (::kvm_ops::Error, ::kvm_ops::EncContext)> {
                    ::kvm_ops::unsupported!("adopt_enc_context").map_err(|error| (error, context))
                }

                /// Creates a slot or changes its flags. The caller checked that it overlaps none.
                ///
                /// # Errors
                /// What the platform answers.
                fn set_memory_slot(&self, slot: &::kvm_ops::MemSlot) -> ::kvm_ops::Result<()>;

                /// Deletes a slot. When it returns, no vCPU sees the memory any more.
                ///
                /// # Errors
                /// What the platform answers.
                fn delete_memory_slot(&self, slot: &::kvm_ops::MemSlot) -> ::kvm_ops::Result<()>;

                /// Fetches and clears a slot's dirty bitmap, bit 0 of word 0 for its first page.
                ///
                /// # Errors
                /// Unsupported for a TD, whose memory the host cannot follow.
                fn dirty_log(
                    &self,
                    slot: &::kvm_ops::MemSlot,
                    bitmap: &mut [u64],
                ) -> ::kvm_ops::Result<()> {
                    let _ = (slot, bitmap);
                    ::kvm_ops::unsupported!("dirty_log")
                }

                /// Places the three pages that VMX may need for real mode.
                ///
                /// # Errors
                /// What the platform answers.
                fn set_tss_addr(&self, gpa: ::kvm_ops::Gpa) -> ::kvm_ops::Result<()> {
                    let _ = gpa;
                    ::kvm_ops::unsupported!("set_tss_addr")
                }

                /// Places the page of the identity map that VMX may need for real mode.
                ///
                /// # Errors
                /// What the platform answers.
                fn set_identity_map_addr(&self, gpa: ::kvm_ops::Gpa) -> ::kvm_ops::Result<()> {
                    let _ = gpa;
                    ::kvm_ops::unsupported!("set_identity_map_addr")
                }

                /// Whether guests may use that MSR though the processor lacks it.
                fn has_emulated_msr(&self, index: u32) -> bool {
                    let _ = index;
                    false
                }

                /// Sends an interrupt to a vCPU's local APIC, from any thread.
                ///
                /// # Errors
                /// Unsupported without an irqchip in the platform.
                fn deliver_interrupt(
                    &self,
                    vcpu: ::kvm_ops::VcpuId,
                    vector: u8,
                ) -> ::kvm_ops::Result<()> {
                    let _ = (vcpu, vector);
                    ::kvm_ops::unsupported!("deliver_interrupt")
                }

                /// A processor goes offline: no vCPU state may stay on it
                /// (`disable_virtualization_cpu`; TDH.VP.FLUSH).
                ///
                /// # Errors
                /// [`Error::Busy`](::kvm_ops::Error::Busy) where the processor is still needed.
                fn disable_virtualization_cpu(
                    &self,
                    cpu: ::kvm_ops::CpuId,
                ) -> ::kvm_ops::Result<()> {
                    let _ = cpu;
                    Ok(())
                }
            }

            /// What every back end answers for a vCPU.
            ///
            /// A vCPU belongs to one thread at a time. What another thread may do to it goes
            /// through the VM, or through its [`kick_handle`](Self::kick_handle). What a TD is
            /// answered without asking TDX is generated from one table: see
            /// [`protected_vcpu_answers!`](::kvm_ops::protected_vcpu_answers).
            $($attr)*
            pub trait VcpuOps: Send {
                /// The vCPU's index.
                fn id(&self) -> ::kvm_ops::VcpuId;

                /// Runs the guest until something needs the embedder.
                ///
                /// # Errors
                /// [`Error::WrongState`](::kvm_ops::Error::WrongState) where the VM may not run;
                /// what the system answers otherwise.
                fn vcpu_run(&mut self) -> ::kvm_ops::Result<::kvm_ops::Exit<'_>>;

                /// A handle that makes `vcpu_run` return, from any thread.
                fn kick_handle(&self) -> ::kvm_ops::Arc<dyn ::kvm_ops::Kick>;

                /// Resets the vCPU: to the state after power-on, or after INIT.
                ///
                /// # Errors
                /// Unsupported for INIT to a TD.
                fn vcpu_reset(&mut self, init_event: bool) -> ::kvm_ops::Result<()>;

                /// The vCPU will run on this processor until `vcpu_put`.
                ///
                /// # Errors
                /// What firmware answers when it is still associated with another processor.
                fn vcpu_load(&mut self, cpu: ::kvm_ops::CpuId) -> ::kvm_ops::Result<()> {
                    let _ = cpu;
                    Ok(())
                }

                /// The vCPU leaves its processor.
                fn vcpu_put(&mut self) {}

                /// Gives the vCPU back.
                ///
                /// # Errors
                /// Where the system keeps it.
                fn vcpu_free(self) -> ::kvm_ops::Result<()>
                where
                    Self: Sized;

                /// Runs a technology's own command on the vCPU (`vcpu_mem_enc_ioctl`).
                ///
                /// # Errors
                /// What the command says.
                fn vcpu_mem_enc_op(
                    &mut self,
                    cmd: &mut ::kvm_ops::EncCmd<'_>,
                ) -> ::kvm_ops::Result<()> {
                    let _ = cmd;
                    ::kvm_ops::unsupported!("vcpu_mem_enc_op")
                }

                /// Gives a guest program to a vCPU of a software platform; it starts with the next
                /// `vcpu_run`. A real processor runs what is in memory instead.
                ///
                /// # Errors
                /// Unsupported on a real processor.
                fn load_program(
                    &mut self,
                    program: ::kvm_ops::Box<dyn ::kvm_ops::guest::GuestProgram>,
                ) -> ::kvm_ops::Result<()> {
                    let _ = program;
                    ::kvm_ops::unsupported!("load_program")
                }

                /// Reads the general registers.
                ///
                /// # Errors
                /// Unsupported where they are the guest's secret.
                fn get_regs(&self) -> ::kvm_ops::Result<::kvm_ops::Regs> {
                    ::kvm_ops::unsupported!("get_regs")
                }

                /// Writes the general registers.
                ///
                /// # Errors
                /// Unsupported where they are the guest's secret.
                fn set_regs(&mut self, regs: &::kvm_ops::Regs) -> ::kvm_ops::Result<()> {
                    let _ = regs;
                    ::kvm_ops::unsupported!("set_regs")
                }

                /// Sets what CPUID answers (`vcpu_after_set_cpuid`).
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_cpuid(&mut self, entries: &[::kvm_ops::CpuidEntry]) -> ::kvm_ops::Result<()> {
                    let _ = entries;
                    ::kvm_ops::unsupported!("set_cpuid")
                }

                /// Reads an MSR.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for an MSR that the vCPU lacks.
                fn get_msr(&self, index: u32) -> ::kvm_ops::Result<u64> {
                    let _ = index;
                    ::kvm_ops::unsupported!("get_msr")
                }

                /// Writes an MSR.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for an MSR that the vCPU lacks,
                /// or a value that it does not take.
                fn set_msr(&mut self, index: u32, value: u64) -> ::kvm_ops::Result<()> {
                    let _ = (index, value);
                    ::kvm_ops::unsupported!("set_msr")
                }

                /// Writes IA32_EFER.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_efer(&mut self, value: u64) -> ::kvm_ops::Result<()> {
                    let _ = value;
                    ::kvm_ops::unsupported!("set_efer")
                }

                /// Reads the base of a segment.
                ///
                /// # Errors
                /// What the platform answers.
                fn get_segment_base(
                    &self,
                    segment: ::kvm_ops::SegmentName,
                ) -> ::kvm_ops::Result<u64> {
                    self.get_segment(segment).map(|segment| segment.base)
                }

                /// Reads a segment register.
                ///
                /// # Errors
                /// What the platform answers.
                fn get_segment(
                    &self,
                    segment: ::kvm_ops::SegmentName,
                ) -> ::kvm_ops::Result<::kvm_ops::Segment> {
                    let _ = segment;
                    ::kvm_ops::unsupported!("get_segment")
                }

                /// Writes a segment register.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_segment(
                    &mut self,
                    segment: ::kvm_ops::SegmentName,
                    value: &::kvm_ops::Segment,
                ) -> ::kvm_ops::Result<()> {
                    let _ = (segment, value);
                    ::kvm_ops::unsupported!("set_segment")
                }

                /// The current privilege level, 0 to 3.
                ///
                /// # Errors
                /// What the platform answers.
                fn get_cpl(&self) -> ::kvm_ops::Result<u8> {
                    self.get_segment(::kvm_ops::SegmentName::Ss).map(|ss| ss.dpl)
                }

                /// The default operation size (D) and 64-bit mode (L) of the code segment.
                ///
                /// # Errors
                /// What the platform answers.
                fn get_cs_db_l_bits(&self) -> ::kvm_ops::Result<(bool, bool)> {
                    self.get_segment(::kvm_ops::SegmentName::Cs).map(|cs| (cs.db, cs.l))
                }

                /// Whether the vCPU can take this value in CR0: PG needs PE, NW needs CD
                /// (SDM vol. 3, 2.5).
                fn is_valid_cr0(&self, value: u64) -> bool {
                    ::kvm_ops::control::cr0_is_valid(value)
                }

                /// Whether the vCPU can take this value in CR4.
                fn is_valid_cr4(&self, value: u64) -> bool {
                    ::kvm_ops::control::cr4_is_valid(value)
                }

                /// Writes CR0.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for a value that is not valid.
                fn set_cr0(&mut self, value: u64) -> ::kvm_ops::Result<()> {
                    let _ = value;
                    ::kvm_ops::unsupported!("set_cr0")
                }

                /// Writes CR4.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for a value that is not valid.
                fn set_cr4(&mut self, value: u64) -> ::kvm_ops::Result<()> {
                    let _ = value;
                    ::kvm_ops::unsupported!("set_cr4")
                }

                /// Reads IDTR.
                ///
                /// # Errors
                /// What the platform answers.
                fn get_idt(&self) -> ::kvm_ops::Result<::kvm_ops::DescTable> {
                    ::kvm_ops::unsupported!("get_idt")
                }

                /// Writes IDTR.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_idt(&mut self, table: ::kvm_ops::DescTable) -> ::kvm_ops::Result<()> {
                    let _ = table;
                    ::kvm_ops::unsupported!("set_idt")
                }

                /// Reads GDTR.
                ///
                /// # Errors
                /// What the platform answers.
                fn get_gdt(&self) -> ::kvm_ops::Result<::kvm_ops::DescTable> {
                    ::kvm_ops::unsupported!("get_gdt")
                }

                /// Writes GDTR.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_gdt(&mut self, table: ::kvm_ops::DescTable) -> ::kvm_ops::Result<()> {
                    let _ = table;
                    ::kvm_ops::unsupported!("set_gdt")
                }

                /// Writes DR7.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_dr7(&mut self, value: u64) -> ::kvm_ops::Result<()> {
                    let _ = value;
                    ::kvm_ops::unsupported!("set_dr7")
                }

                /// Reads RFLAGS.
                ///
                /// # Errors
                /// What the platform answers.
                fn get_rflags(&self) -> ::kvm_ops::Result<u64> {
                    self.get_regs().map(|regs| regs.rflags)
                }

                /// Writes RFLAGS.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_rflags(&mut self, value: u64) -> ::kvm_ops::Result<()> {
                    let mut regs = self.get_regs()?;
                    regs.rflags = value;
                    self.set_regs(&regs)
                }

                /// Whether the guest has interrupts enabled (RFLAGS.IF).
                ///
                /// # Errors
                /// What the platform answers.
                fn get_if_flag(&self) -> ::kvm_ops::Result<bool> {
                    self.get_rflags().map(|rflags| rflags & (1 << 9) != 0)
                }

                /// Switches guest debugging on or off (`update_exception_bitmap`): exits on #DB
                /// and #BP, single step.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_guest_debug(&mut self, debug: bool, single_step: bool) -> ::kvm_ops::Result<()> {
                    let _ = (debug, single_step);
                    ::kvm_ops::unsupported!("set_guest_debug")
                }

                /// Tells the vCPU where the tables of shared memory are: EPTP, nested CR3, or a
                /// TD's shared EPTP.
                ///
                /// # Errors
                /// What firmware answers.
                fn load_mmu_pgd(&mut self, root: ::kvm_ops::Hpa, levels: u8) -> ::kvm_ops::Result<()> {
                    let _ = (root, levels);
                    ::kvm_ops::unsupported!("load_mmu_pgd")
                }

                /// Injects an external interrupt, for an embedder with its own interrupt
                /// controllers.
                ///
                /// # Errors
                /// [`Error::Exists`](::kvm_ops::Error::Exists) while one is pending already;
                /// unsupported with an irqchip in the platform.
                fn inject_irq(&mut self, vector: u8) -> ::kvm_ops::Result<()> {
                    let _ = vector;
                    ::kvm_ops::unsupported!("inject_irq")
                }

                /// Injects an NMI.
                ///
                /// # Errors
                /// What the platform answers.
                fn inject_nmi(&mut self) -> ::kvm_ops::Result<()> {
                    ::kvm_ops::unsupported!("inject_nmi")
                }

                /// Injects an exception.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for a vector above 31.
                fn inject_exception(
                    &mut self,
                    exception: ::kvm_ops::Exception,
                ) -> ::kvm_ops::Result<()> {
                    let _ = exception;
                    ::kvm_ops::unsupported!("inject_exception")
                }

                /// Takes back what was injected and not delivered.
                ///
                /// # Errors
                /// What the platform answers.
                fn cancel_injection(&mut self) -> ::kvm_ops::Result<()> {
                    ::kvm_ops::unsupported!("cancel_injection")
                }

                /// Whether the guest would take an interrupt now.
                ///
                /// # Errors
                /// What the platform answers.
                fn interrupt_allowed(&self) -> ::kvm_ops::Result<bool> {
                    Ok(self.get_if_flag()? && self.get_interrupt_shadow()? == 0)
                }

                /// Whether the guest would take an NMI now.
                ///
                /// # Errors
                /// What the platform answers.
                fn nmi_allowed(&self) -> ::kvm_ops::Result<bool> {
                    Ok(!self.get_nmi_mask()? && self.get_interrupt_shadow()? == 0)
                }

                /// Whether NMIs are blocked.
                ///
                /// # Errors
                /// What the platform answers.
                fn get_nmi_mask(&self) -> ::kvm_ops::Result<bool> {
                    ::kvm_ops::unsupported!("get_nmi_mask")
                }

                /// Blocks or unblocks NMIs.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_nmi_mask(&mut self, masked: bool) -> ::kvm_ops::Result<()> {
                    let _ = masked;
                    ::kvm_ops::unsupported!("set_nmi_mask")
                }

                /// Asks for [`Exit::IrqWindow`](::kvm_ops::Exit::IrqWindow) as soon as the guest
                /// can take an interrupt.
                ///
                /// # Errors
                /// What the platform refuses.
                fn enable_irq_window(&mut self) -> ::kvm_ops::Result<()> {
                    ::kvm_ops::unsupported!("enable_irq_window")
                }

                /// The interrupt shadow: bit 0 after MOV SS, bit 1 after STI
                /// (`KVM_X86_SHADOW_INT_*`).
                ///
                /// # Errors
                /// What the platform answers.
                fn get_interrupt_shadow(&self) -> ::kvm_ops::Result<u32> {
                    ::kvm_ops::unsupported!("get_interrupt_shadow")
                }

                /// Sets the interrupt shadow.
                ///
                /// # Errors
                /// What the platform refuses.
                fn set_interrupt_shadow(&mut self, shadow: u32) -> ::kvm_ops::Result<()> {
                    let _ = shadow;
                    ::kvm_ops::unsupported!("set_interrupt_shadow")
                }

                /// Sets what is added to the host's TSC.
                ///
                /// # Errors
                /// What the platform refuses.
                fn write_tsc_offset(&mut self, offset: u64) -> ::kvm_ops::Result<()> {
                    let _ = offset;
                    ::kvm_ops::unsupported!("write_tsc_offset")
                }

                /// Sets the guest's TSC frequency, in kHz.
                ///
                /// # Errors
                /// [`Error::Invalid`](::kvm_ops::Error::Invalid) for a frequency out of range.
                fn write_tsc_multiplier(&mut self, khz: u32) -> ::kvm_ops::Result<()> {
                    let _ = khz;
                    ::kvm_ops::unsupported!("write_tsc_multiplier")
                }

                /// Gives the vCPU machine-check banks (`KVM_X86_SETUP_MCE`).
                ///
                /// # Errors
                /// What the platform refuses.
                fn setup_mce(&mut self, mcg_cap: u64) -> ::kvm_ops::Result<()> {
                    let _ = mcg_cap;
                    ::kvm_ops::unsupported!("setup_mce")
                }
            }
        }
        $($rest)*
    };
}
