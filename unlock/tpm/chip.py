# SPDX-License-Identifier: Apache-2.0
"""Talks to the TPM: ESYS calls through the compiled part of tpm2-pytss. Nothing else in unlock does.

It loads only the extension module: 10 ms instead of the 56 of tpm2_pytss itself, and the same in each version. It
computes names from the public areas, because ESYS takes the name that it is given without a check.
"""

import os
import struct
import sys
import time

from ..errors import (
    Malformed,
    NoSlot,
    PinLockout,
    PinWrong,
    Refused,
    Tampered,
    TpmAbsent,
    TpmFailed,
    TpmLockout,
    TpmRefused,
    UnlockError,
    Usage,
)
from ..light import Any, Callable, NamedTuple, Sequence, signal
from ..paths import TPM_DEVICE
from ..secret import Secret
from . import answers, pcr_policy, public_area
from .pcr_policy import BANK
from .record import MAX_SEALED, RECORD_SIZE, SLOTS, SRK, Record, Slot

_NONE, _PASSWORD, _OWNER, _ENDORSEMENT = 0xFFF, 0xFF, 0x101, 0x10B  # ESYS_TR_...
_NO_SESSIONS = (_NONE, _NONE, _NONE)
_HMAC, _POLICY, _TRIAL = 0, 1, 3  # TPM2_SE_...
_CONTINUE = 0x01  # the session outlives its command
_DECRYPT, _ENCRYPT = 0x20, 0x40  # the first parameter: on its way to the TPM, from the TPM
_PAUSES = (
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
)  # seconds: ESYS resubmits at once, but a self-test takes longer
_TRY_AGAIN = 9  # TSS2_BASE_RC_TRY_AGAIN, of any layer
_TRIES = 3
NO_BANK = "no-sha256-bank"
_MAX_ROUNDS = 64  # of a command that answers in parts

_NO_READING = (
    answers.NV_LOCKED,
    answers.NV_AUTHORIZATION,
    answers.AUTH_FAIL,
    answers.BAD_AUTH,
    answers.AUTH_UNAVAILABLE,
)

Meanwhile = Callable[[], None] | None
"""Called while the TPM works. It raises nothing."""


class ResponseError(TpmFailed):
    """A command's response code that is not success. `answer` is a code of answers.ANSWERS."""

    def __init__(self, command: str, rc: int) -> None:
        self.command, self.answer = command, answers.code_of(rc)
        words, hint = answers.describe(command, rc)
        super().__init__(f"TPM2_{command} failed: {words} ({rc:#x})", hint)
        self.transient = answers.is_transient(rc)


class Facts(NamedTuple):
    """What `init` and `check` must know of a TPM before this host relies on it."""

    manufacturer: str
    sha256_bank: bool
    """All of PCRs 0 to 23 have a sha256 value."""
    owner_auth_set: bool
    lockout_auth_set: bool
    """Without it, anyone who boots this host, in whatever state, can reset the count of wrong tries."""
    in_lockout: bool
    lockout_counter: int
    lockout_interval: int
    """Seconds until the counter falls by one."""
    persistent_free: int
    """A lower bound; a policy change needs 1, and the first one 1 more for an SRK that is not there yet."""
    nv_buffer: int
    """Most bytes of one NV_Read: RECORD_SIZE at least, or there is no boot with this TPM."""
    nv_index_size: int
    """Most bytes of one NV index. The TPM does not tell how many more fit: NV_DefineSpace does."""
    srk: bool
    taken: tuple[int, ...]
    """Handles of our slots that exist already."""


class SlotState(NamedTuple):
    """One slot: the record, or what is wrong with it, and the object's name if there is one."""

    record: Record | None
    problem: UnlockError | None
    object_name: bytes | None

    @property
    def complete(self) -> bool:
        """The object is there and the record describes it."""
        return self.record is not None and self.record.object_name == self.object_name


def _uninterrupted(call: Callable[..., int], *arguments: Any) -> int:
    """The result of a call that exchanges bytes with the TPM. Signals wait: the TCTI takes a poll(2) that one ends for
    a broken line (0xa000a), and the answer is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return call(*arguments)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Tpm:
    """One connection. Each method names the commands that it sends; each raises TpmFailed when one fails."""

    def __init__(self, tcti: str = TPM_DEVICE) -> None:
        """TpmAbsent if the device, or the TCTI library for it, cannot be opened.

        The TCTI of a device sends one GetRandom, to learn whether the driver gives an answer in parts.
        """
        self._lib, self._ffi = _load()
        self._name = tcti
        self._tcti, self._context = self._ffi.new("TSS2_TCTI_CONTEXT **"), self._ffi.new("ESYS_CONTEXT **")
        self._resources: dict[int, int] = {}  # ESYS_TR by handle of what is persistent
        self.open()

    def open(self) -> None:
        """Opens the connection again, if it was closed. TpmAbsent, TpmFailed."""
        if self._context[0] != self._ffi.NULL:
            return
        if rc := self._lib.Tss2_TctiLdr_Initialize(self._name.encode(), self._tcti):
            raise TpmAbsent(f"cannot open the TPM {self._name}: {rc:#x}", "unlock explain")
        if rc := self._lib.Esys_Initialize(self._context, self._tcti[0], self._ffi.NULL):
            self._lib.Tss2_TctiLdr_Finalize(self._tcti)
            raise TpmFailed(f"Esys_Initialize failed: {rc:#x}")

    def close(self) -> None:
        """Sends nothing. May be called twice."""
        self._resources.clear()
        self._lib.Esys_Finalize(self._context)
        self._lib.Tss2_TctiLdr_Finalize(self._tcti)

    def __enter__(self) -> "Tpm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Boot ---------------------------------------------------------------------------------------------------

    def read_record(self, slot: Slot) -> Record:
        """The policy record of a slot. NV_Read. Raises NoSlot if there is none; Malformed, NewerFormat; Tampered for an
        index that unlock did not make, TpmLockout where the TPM in lockout does not show that.

        NV_ReadPublic is not needed: the public area of unlock's own index is known, and NV_Read fails for another.
        """
        public = public_area.nv_public(slot, written=True)
        # an ESYS_TR as Esys_TR_Serialize writes it: handle, name, type 2 (NV index), public area
        known = struct.pack(">IH34sIH", slot.nv, 34, public_area.name(public), 2, len(public)) + public
        index = self._resource(slot.nv)
        self._send("TR_Deserialize", known, len(known), index)
        self._resources[slot.nv] = index[0]
        data = self._ffi.new("TPM2B_MAX_NV_BUFFER **")
        try:
            self._send("NV_Read", index[0], index[0], _PASSWORD, _NONE, _NONE, RECORD_SIZE, 0, data)
        except ResponseError as failure:
            if failure.answer in (answers.HANDLE, answers.NV_UNINITIALIZED):
                raise NoSlot(f"slot {slot.name} of the TPM has no policy record") from None
            if failure.answer == answers.NV_RANGE:
                raise Malformed(f"the policy record of slot {slot.name} is too short") from None
            if failure.answer == answers.LOCKOUT:  # another's index: ours is outside of it
                raise TpmLockout(str(failure), failure.hint) from None
            if failure.answer in _NO_READING:
                raise Tampered(f"the record of slot {slot.name} may not be read: it is not ours") from None
            raise
        return Record.decode(bytes(self._taken(data, "buffer")))

    def unseal(
        self, objects: tuple[int, int], record: Record, auth: Secret | None = None, meanwhile: Meanwhile = None
    ) -> Secret:
        """StartAuthSession, PolicyPCR, PolicyOR, [PolicyAuthValue], Unseal; FlushContext if it fails.

        `objects` are those of `verify`; `auth` is the value that the PIN makes, where the record has one. `meanwhile`
        is called while the TPM makes the session, which takes a discrete one a quarter of a second. The session
        is salted to the SRK and encrypts the answer; the value itself never crosses the bus. TpmRefused if the PCRs
        are in no allowed state, which costs no try of the PIN; PinWrong, PinLockout. Repeated, bounded, if a PCR
        changes meanwhile.

        ESYS keeps the answer, decrypted, until the next command is in its place, and frees it as it is: send one before
        a fork. In early boot that is the cap.
        """
        return self._unsealed(*objects, record.selection, record.branches, auth, meanwhile)

    def verify(self, slot: Slot, record: Record) -> tuple[int, int]:
        """ReadPublic x2: SRK and sealed object are those that the record describes, the SRK is a key that has never
        been outside of this TPM, and the object's policy is what the record's branches make. Gives both as ESYS_TR.

        NoSlot, Tampered. The record itself may be anybody's: with the owner's authorization it could name an SRK whose
        private part he has, and who listens on the bus would read what is unsealed, and guess the PIN from its proof.
        """
        srk = self._named(SRK, record.srk_name, "the storage root key")
        sealed, public = self._public(slot.object, f"slot {slot.name} of the TPM has no sealed object")
        if public_area.name(public) != record.object_name:
            raise Tampered(f"the sealed object of slot {slot.name} is not the one of its policy record")
        if not public_area.is_sealed_under(public, record.branches, record.pin):
            raise Tampered(f"the sealed object of slot {slot.name} has another policy than its record says")
        return srk, sealed

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extends a PCR of the sha256 bank; returns when the TPM has confirmed it. PCR_Extend. Ends every policy
        session."""
        values = self._ffi.new("TPML_DIGEST_VALUES *", {"count": 1})
        values.digests[0].hashAlg = BANK
        values.digests[0].digest.sha256 = digest
        self._send("PCR_Extend", pcr, _PASSWORD, _NONE, _NONE, values)

    # Operations ---------------------------------------------------------------------------------------------

    def ensure_srk(self, owner_auth: Secret | None = None) -> bytes:
        """The name of the SRK, which is made if there is none. ReadPublic; if absent CreatePrimary, EvictControl,
        FlushContext, ReadPublic.

        Refused if the object at that handle is no storage key (RSA and ECC P-256 are accepted).
        """
        try:
            _, public = self._public(SRK, "no SRK")
        except NoSlot:
            self._make_srk(owner_auth)
            _, public = self._public(SRK, "the SRK that was made is not there")
        if problem := public_area.srk_problem(public):
            raise Refused(
                f"the object at {SRK:#x} is no storage root key: {problem}",
                hint=f"tpm2_evictcontrol -c {SRK:#x}",
            )
        return public_area.name(public)

    def srk_name(self) -> bytes:
        """The name of the object at the SRK's handle; b"" when there is none. ReadPublic."""
        try:
            return public_area.name(self._public(SRK, "")[1])
        except NoSlot:
            return b""

    def chip_name(self) -> bytes:
        """A name that only this chip has, also after TPM2_Clear. CreatePrimary, ReadPublic, FlushContext.

        It is that of a key of the endorsement hierarchy, whose seed is the manufacturer's. TpmFailed where that
        hierarchy has a password or is off.
        """
        key = self._primary(_ENDORSEMENT, _Session(self, _PASSWORD))
        try:
            return public_area.name(self._area(key))
        finally:
            self._flush(key)

    def seal(
        self,
        slot: Slot,
        branches: Sequence[bytes],
        payload: Secret,
        *,
        owner_auth: Secret | None = None,
        pin_auth: Secret | None = None,
    ) -> bytes:
        """Seals `payload`, at most 128 bytes, in place of the slot's object. Returns the new object's name.

        With `pin_auth` it is opened by the policy and this value, and the TPM counts wrong ones.
        ReadPublic (SRK), StartAuthSession, Create, Load, ReadPublic, [EvictControl], EvictControl,
        FlushContext. Payload and value are encrypted on their way, and so is the object itself: whoever has recorded it
        could load it again when its policy is long gone. Not CreateLoaded: TPMs older than revision 1.38 lack it.
        """
        sealed, name = self._create(branches, payload, pin_auth=pin_auth)
        try:
            self._evict_object(slot, owner_auth)
            self._keep(sealed, slot.object, owner_auth)
        finally:
            self._flush(sealed)
        return name

    def write_record(self, slot: Slot, record: Record, owner_auth: Secret | None = None) -> None:
        """Writes a slot's policy record. NV_ReadPublic, [NV_UndefineSpace], [NV_DefineSpace], NV_Write."""
        data = record.encode()
        index = self._find(slot.nv)
        if index and self._shown(index)[1] not in (public_area.nv_public(slot, written) for written in (False, True)):
            self._undefine(index, owner_auth)
            index = 0
        index = index or self._define(slot, owner_auth)
        buffer = self._ffi.new("TPM2B_MAX_NV_BUFFER *", {"size": len(data), "buffer": data})
        with self._owner(owner_auth) as session:
            self._send("NV_Write", _OWNER, index, session, _NONE, _NONE, buffer, 0)

    def evict(self, slot: Slot, owner_auth: Secret | None = None) -> None:
        """Removes a slot's object, then its record. ReadPublic, [EvictControl], NV_ReadPublic, [NV_UndefineSpace]."""
        self._evict_object(slot, owner_auth)
        if index := self._find(slot.nv):
            self._undefine(index, owner_auth)

    def slot_state(self, slot: Slot) -> SlotState:
        """A slot's record, and the name of its object. NV_Read, ReadPublic."""
        record: Record | None = None
        problem: UnlockError | None = None
        object_name = None
        try:
            record = self.read_record(slot)
        except (NoSlot, Malformed, Tampered, TpmLockout) as error:
            problem = error
        try:
            object_name = public_area.name(self._public(slot.object, "")[1])
        except (NoSlot, Tampered):
            pass  # no object, or one that we did not make
        return SlotState(record, problem, object_name)

    def read_pcrs(self, pcrs: Sequence[int]) -> dict[int, bytes]:
        """PCR -> its sha256 value. PCR_Read, one for 8 PCRs. TpmFailed, code no-sha256-bank, if it
        lacks one."""
        values: dict[int, bytes] = {}
        read, digests = self._ffi.new("TPML_PCR_SELECTION **"), self._ffi.new("TPML_DIGEST **")
        while missing := sorted(set(pcrs) - set(values)):
            counter = self._ffi.new("uint32_t *")
            self._send("PCR_Read", *_NO_SESSIONS, self._selection(missing), counter, read, digests)
            bits = self._bits(read[0])
            got = [pcr for pcr in missing if bits >> pcr & 1]
            if not got or len(got) != digests[0].count:
                raise bank_off()
            values |= {pcr: self._ffi.buffer(digests[0].digests[at].buffer)[:32] for at, pcr in enumerate(got)}
            self._lib.Esys_Free(read[0])
            self._lib.Esys_Free(digests[0])
        return values

    def try_sealing(self, selection: Sequence[int]) -> None:
        """Seals a sample to the present PCR values and unseals it again. Leaves nothing. Needs an SRK.

        PCR_Read, ReadPublic, StartAuthSession, Create, Load, ReadPublic, StartAuthSession, PolicyPCR,
        PolicyOR, Unseal, FlushContext.
        """
        branches = (pcr_policy.policy_pcr(selection, self.read_pcrs(selection)),)
        with Secret.random(32) as sample:
            sealed, _ = self._create(branches, sample)
            try:
                with self._unsealed(self._storage_root_key(), sealed, selection, branches) as found:
                    if found != sample:
                        raise TpmFailed("the TPM unseals something else than was sealed")
            finally:
                self._flush(sealed)

    def facts(self) -> Facts:
        """GetCapability, about 5."""
        fixed, variable = self._properties(0x100), self._properties(0x200)
        banks, _ = self._capability(0x5, 0, 1)
        persistent, indexes = self._handles(0x81000000), self._handles(0x01000000)
        permanent = variable.get(0x200, 0)
        return Facts(
            manufacturer=fixed.get(0x105, 0).to_bytes(4, "big").decode("ascii", "replace").strip("\0 "),
            sha256_bank=self._bits(banks.data.assignedPCR) & 0xFFFFFF == 0xFFFFFF,
            owner_auth_set=bool(permanent & 1),
            lockout_auth_set=bool(permanent & 1 << 2),
            in_lockout=bool(permanent & 1 << 9),
            lockout_counter=variable.get(0x20E, 0),
            lockout_interval=variable.get(0x210, 0),
            persistent_free=variable.get(0x209, 0),
            nv_buffer=fixed.get(0x12C, 0),
            nv_index_size=fixed.get(0x117, 0),
            srk=SRK in persistent,
            taken=tuple(h for slot in SLOTS for h in (slot.object, slot.nv) if h in persistent + indexes),
        )

    # One command each ---------------------------------------------------------------------------------------

    def _send(self, call: str, *arguments: Any) -> None:
        """Calls ESYS, again while the TPM is busy."""
        function = getattr(self._lib, "Esys_" + call)
        rc = _uninterrupted(function, self._context[0], *arguments)
        for pause in _PAUSES:
            if rc not in answers.BUSY:
                break
            time.sleep(pause)
            rc = _uninterrupted(function, self._context[0], *arguments)
        if rc:
            raise ResponseError(call.replace("TR_FromTPMPublic", "ReadPublic"), rc)

    def _public(self, handle: int, absent: str) -> tuple[int, bytes]:
        """The ESYS_TR of what is persistent at this handle, and its public area. ReadPublic, or NV_ReadPublic. Raises
        NoSlot with the message `absent`."""
        resource = self._find(handle)
        if not resource:
            raise NoSlot(absent)
        return resource, self._area(resource)

    def _find(self, handle: int) -> int:
        """The ESYS_TR of what is persistent at this handle, 0 for nothing. ReadPublic, or NV_ReadPublic."""
        resource = self._resource(handle)
        try:
            self._send("TR_FromTPMPublic", handle, *_NO_SESSIONS, resource)
        except ResponseError as failure:
            if failure.answer == answers.HANDLE:
                return 0
            raise
        self._resources[handle] = resource[0]
        return self._resources[handle]

    def _resource(self, handle: int) -> Any:
        """Room for an ESYS_TR of this handle. The last is closed: ESYS would return it, as it was then."""
        resource = self._ffi.new("ESYS_TR *", self._resources.pop(handle, _NONE))
        if resource[0] != _NONE:
            self._lib.Esys_TR_Close(self._context[0], resource)
        return resource

    def _area(self, resource: int) -> bytes:
        """The public area that ESYS holds. Tampered if the name that it holds is not this area's."""
        name, area = self._shown(resource)
        if public_area.name(area) != name:
            raise Tampered("the TPM shows an object whose name is not that of its public area (SHA-256)")
        return area

    def _shown(self, resource: int) -> tuple[bytes, bytes]:
        """The name and the public area that ESYS holds: Esys_TR_Serialize has no other way to tell them."""
        buffer, size = self._ffi.new("uint8_t **"), self._ffi.new("size_t *")
        self._send("TR_Serialize", resource, buffer, size)
        data = bytes(self._ffi.buffer(buffer[0], size[0]))
        self._lib.Esys_Free(buffer[0])
        end = 6 + int.from_bytes(data[4:6], "big")  # handle u32, name TPM2B, type u32, public area TPM2B
        return data[6:end], data[end + 6 :]

    def _named(self, handle: int, name: bytes, what: str) -> int:
        """ReadPublic; Tampered unless it is the object with this name."""
        try:
            resource, public = self._public(handle, "")
        except NoSlot:
            raise Tampered(f"{what} at {handle:#x} is gone", hint="reboot and type the recovery key") from None
        if public_area.name(public) != name or public_area.srk_problem(public):
            raise Tampered(
                f"{what} at {handle:#x} is another one than when this host was enrolled",
                hint="reboot and type the recovery key",
            )
        return resource

    def _unsealed(
        self,
        srk: int,
        sealed: int,
        selection: Sequence[int],
        branches: Sequence[bytes],
        auth: Secret | None = None,
        meanwhile: Meanwhile = None,
    ) -> Secret:
        for _ in range(_TRIES):
            try:
                return self._unsealed_once(srk, sealed, selection, branches, auth, meanwhile)
            except ResponseError as failure:
                if auth is not None and failure.answer == answers.AUTH_FAIL:
                    raise PinWrong("the PIN is wrong") from None
                if auth is not None and failure.answer == answers.LOCKOUT:
                    raise self._locked_out() from None
                if failure.answer != answers.PCR_CHANGED:
                    raise
        raise TpmFailed("PCRs keep changing while the TPM unseals")

    def _locked_out(self) -> PinLockout:
        """GetCapability, about 5."""
        try:
            wait = f"it forgets one try in {self.facts().lockout_interval} s with the power on"
        except TpmFailed as error:
            wait = str(error)
        return PinLockout(f"the TPM takes no PIN after too many wrong ones: {wait}", "wait, or type the recovery key")

    def _unsealed_once(
        self,
        srk: int,
        sealed: int,
        selection: Sequence[int],
        branches: Sequence[bytes],
        auth: Secret | None,
        meanwhile: Meanwhile,
    ) -> Secret:
        data = self._ffi.new("TPM2B_SENSITIVE_DATA **")
        digests = [{"size": len(digest), "buffer": digest} for digest in pcr_policy.alternatives(branches)]
        allowed = self._ffi.new("TPML_DIGEST *", {"count": len(digests), "digests": digests})
        present = self._ffi.new("TPM2B_DIGEST *")  # empty: the TPM takes the PCRs as they are
        with self._session(srk, _POLICY, _ENCRYPT, meanwhile) as session:
            self._send("PolicyPCR", session, *_NO_SESSIONS, present, self._selection(selection))
            try:
                self._send("PolicyOR", session, *_NO_SESSIONS, allowed)
                if auth is not None:
                    self._send("PolicyAuthValue", session, *_NO_SESSIONS)
                    self._set_auth(sealed, auth)
                self._send("Unseal", sealed, session, _NONE, _NONE, data)
            except ResponseError as failure:
                if failure.answer in (answers.VALUE, answers.POLICY_FAIL):
                    raise pcr_refusal(selection) from None
                raise
            finally:
                if auth is not None:
                    self._set_auth(sealed, Secret(b""))
        taken = self._taken(data, "buffer")
        try:
            return Secret(taken)
        finally:
            taken[:] = bytes(len(taken))

    def _create(
        self, branches: Sequence[bytes], payload: Secret, *, pin_auth: Secret | None = None
    ) -> tuple[int, bytes]:
        """Makes a transient sealed object; returns its ESYS_TR and name.

        One session, salted to the SRK, encrypts the first parameter of each way: inSensitive and outPrivate of Create,
        inPrivate of Load.
        """
        srk = self._storage_root_key()
        ffi, template = self._ffi, self._template(public_area.sealed_template(branches, pin_auth is not None))
        sensitive = ffi.new("TPM2B_SENSITIVE_CREATE *")
        private, public, sealed = (
            ffi.new("TPM2B_PRIVATE **"),
            ffi.new("TPM2B_PUBLIC **"),
            ffi.new("ESYS_TR *"),
        )
        if len(payload) > MAX_SEALED:
            raise Malformed(f"{len(payload)} bytes cannot be sealed: {MAX_SEALED} at most")
        try:
            sensitive.sensitive.data.size = len(payload)
            ffi.memmove(sensitive.sensitive.data.buffer, payload.value, len(payload))
            if pin_auth is not None:
                sensitive.sensitive.userAuth.size = len(pin_auth)
                ffi.memmove(sensitive.sensitive.userAuth.buffer, pin_auth.value, len(pin_auth))
            with self._session(srk, _HMAC, _DECRYPT | _ENCRYPT | _CONTINUE) as session:
                creation = (*self._no_creation_data(), private, public, *[ffi.NULL] * 3)
                self._send("Create", srk, session, _NONE, _NONE, sensitive, template, *creation)
                self._send("TRSess_SetAttributes", session, _DECRYPT, 0xFF)
                self._send("Load", srk, session, _NONE, _NONE, private[0], public[0], sealed)
        finally:
            ffi.memmove(sensitive, bytes(ffi.sizeof(sensitive[0])), ffi.sizeof(sensitive[0]))
            self._lib.Esys_Free(private[0])
            self._lib.Esys_Free(public[0])
        return sealed[0], public_area.name(self._area(sealed[0]))

    def _storage_root_key(self) -> int:
        """The ESYS_TR of the SRK. ReadPublic. Raises NoSlot, or Tampered where the object there is no SRK: what is
        encrypted to it could be read by whoever has its private part."""
        srk, public = self._public(SRK, f"the TPM has no storage root key at {SRK:#x}")
        if problem := public_area.srk_problem(public):
            raise Tampered(f"the object at {SRK:#x} is no storage root key: {problem}", "unlock explain")
        return srk

    def _make_srk(self, owner_auth: Secret | None) -> None:
        srk = self._primary(_OWNER, self._owner(owner_auth))
        try:
            self._keep(srk, SRK, owner_auth)
        finally:
            self._flush(srk)

    def _primary(self, hierarchy: int, authorization: "_Session") -> int:
        """CreatePrimary with the SRK's template: a transient key, the same one each time."""
        ffi, key = self._ffi, self._ffi.new("ESYS_TR *")
        template = self._template(public_area.srk_template())
        with authorization as session:
            sensitive, creation = ffi.new("TPM2B_SENSITIVE_CREATE *"), self._no_creation_data()
            outputs = (key, *[ffi.NULL] * 4)
            self._send("CreatePrimary", hierarchy, session, _NONE, _NONE, sensitive, template, *creation, *outputs)
        handle: int = key[0]
        return handle

    def _keep(self, transient: int, handle: int, owner_auth: Secret | None) -> None:
        with self._owner(owner_auth) as session:
            kept = self._ffi.new("ESYS_TR *", _NONE)
            self._send("EvictControl", _OWNER, transient, session, _NONE, _NONE, handle, kept)
        self._lib.Esys_TR_Close(self._context[0], kept)

    def _evict_object(self, slot: Slot, owner_auth: Secret | None) -> None:
        if sealed := self._find(slot.object):
            self._keep(sealed, slot.object, owner_auth)  # EvictControl of what is persistent removes it

    def _define(self, slot: Slot, owner_auth: Secret | None) -> int:
        no_auth, index = self._ffi.new("TPM2B_AUTH *"), self._resource(slot.nv)
        public = self._unmarshal("TPM2B_NV_PUBLIC", public_area.nv_public(slot, written=False))
        with self._owner(owner_auth) as session:
            self._send("NV_DefineSpace", _OWNER, session, _NONE, _NONE, no_auth, public, index)
        self._resources[slot.nv] = index[0]
        return self._resources[slot.nv]

    def _undefine(self, index: int, owner_auth: Secret | None) -> None:
        with self._owner(owner_auth) as session:
            self._send("NV_UndefineSpace", _OWNER, index, session, _NONE, _NONE)

    def _flush(self, handle: int) -> None:
        """FlushContext, as well as it can be: it cleans up after a failure and must not hide it."""
        _uninterrupted(self._lib.Esys_FlushContext, self._context[0], handle)

    # Sessions -----------------------------------------------------------------------------------------------

    def _session(self, salt_key: int, kind: int, attributes: int, meanwhile: Meanwhile = None) -> "_Session":
        """StartAuthSession, AES-128-CFB. continueSession is clear: the TPM ends it with its command."""
        symmetric = self._ffi.new("TPMT_SYM_DEF *", {"algorithm": 0x06, "keyBits": {"aes": 128}, "mode": {"aes": 0x43}})
        handle = self._ffi.new("ESYS_TR *")
        what = (salt_key, _NONE, *_NO_SESSIONS, self._ffi.NULL, kind, symmetric, BANK)
        if not (meanwhile and self._started(what, handle, meanwhile)):
            self._send("StartAuthSession", *what, handle)
        self._send("TRSess_SetAttributes", handle[0], attributes, 0xFF)
        return _Session(self, handle[0])

    def _started(self, what: tuple[Any, ...], handle: Any, meanwhile: Callable[[], None]) -> bool:
        """StartAuthSession, and `meanwhile` before its answer is taken. False if it failed."""
        if _uninterrupted(self._lib.Esys_StartAuthSession_Async, self._context[0], *what):
            return False
        meanwhile()
        self._lib.Esys_SetTimeout(self._context[0], -1)
        finish, rc = self._lib.Esys_StartAuthSession_Finish, _TRY_AGAIN
        while rc & 0xFFFF == _TRY_AGAIN:  # ESYS has sent it again
            rc = _uninterrupted(finish, self._context[0], handle)
        return not rc

    def _owner(self, auth: Secret | None) -> "_Session":
        """The owner's authorization of one command: empty, or ReadPublic, StartAuthSession: it never crosses the bus,
        and once there is an SRK, nothing that it could be guessed from."""
        if auth is None or not len(auth):
            return _Session(self, _PASSWORD)
        if len(auth) > 64:
            raise Usage("the owner authorization is longer than a TPM takes: 64 bytes")
        try:
            salt_key = self._storage_root_key()
        except (NoSlot, Tampered):  # `ensure_srk` makes one, or refuses
            salt_key = _NONE
        session = self._session(salt_key, _HMAC, 0)
        self._set_auth(_OWNER, auth)
        return session

    def prove_owner(self, owner_auth: Secret) -> None:
        """Raises TpmFailed unless the TPM takes this as its owner's password. Changes nothing, and counts for no
        lockout: PolicySecret in a trial session. StartAuthSession, what `_owner` sends, PolicySecret, FlushContext."""
        null = self._ffi.NULL
        trial = self._session(_NONE, _TRIAL, 0).handle
        try:
            with self._owner(owner_auth) as session:
                arguments = (_OWNER, trial, session, _NONE, _NONE, null, null, null, 0, null, null)
                self._send("PolicySecret", *arguments)
        finally:
            self._flush(trial)

    def _set_auth(self, resource: int, auth: Secret) -> None:
        """What ESYS proves to the TPM that it knows; b"" wipes it: ESYS would send the owner's in clear later."""
        value = self._ffi.new("TPM2B_AUTH *", {"size": len(auth)})
        self._ffi.memmove(value.buffer, auth.value, len(auth))
        self._send("TR_SetAuth", resource, value)
        self._ffi.memmove(value, bytes(66), 66)

    def _end(self, session: int, failed: bool) -> None:
        """Flush a session whose command failed; wipe the owner's value."""
        if session != _PASSWORD:
            self._set_auth(_OWNER, Secret(b""))
            if failed:
                self._flush(session)

    # Structures ---------------------------------------------------------------------------------------------

    def _taken(self, pointer: Any, field: str) -> bytearray:
        """The bytes of a TPM2B that ESYS allocated, which is wiped and freed."""
        data = pointer[0]
        value = bytearray(self._ffi.buffer(getattr(data, field), data.size))
        self._ffi.memmove(data, bytes(self._ffi.sizeof(data[0])), self._ffi.sizeof(data[0]))
        self._lib.Esys_Free(data)
        return value

    def _selection(self, pcrs: Sequence[int]) -> Any:
        return self._unmarshal("TPML_PCR_SELECTION", pcr_policy.selection_bytes(pcrs), sized=False)

    def _template(self, public: bytes) -> Any:
        return self._unmarshal("TPM2B_PUBLIC", public)

    def _no_creation_data(self) -> tuple[Any, Any]:
        return self._ffi.new("TPM2B_DATA *"), self._ffi.new("TPML_PCR_SELECTION *")

    def _unmarshal(self, kind: str, data: bytes, sized: bool = True) -> Any:
        """The C structure of these bytes, with a TPM2B's size put before them."""
        wire = struct.pack(">H", len(data)) + data if sized else data
        structure = self._ffi.new(kind + " *")
        if rc := getattr(self._lib, f"Tss2_MU_{kind}_Unmarshal")(wire, len(wire), self._ffi.NULL, structure):
            raise TpmFailed(f"cannot make a {kind}: {rc:#x}")
        return structure

    def _bits(self, selections: Any) -> int:
        """The sha256 PCRs of a TPML_PCR_SELECTION, as a bitmap."""
        found = [s for s in list(selections.pcrSelections)[: selections.count] if s.hash == BANK]
        return int.from_bytes(b"".join(bytes(s.pcrSelect)[: s.sizeofSelect] for s in found[:1]), "little")

    # Capabilities -------------------------------------------------------------------------------------------

    def _capability(self, capability: int, first: int, count: int) -> tuple[Any, bool]:
        """GetCapability: the TPMS_CAPABILITY_DATA, freed with its pointer, and whether there is more."""
        more, data = self._ffi.new("uint8_t *"), self._ffi.new("TPMS_CAPABILITY_DATA **")
        self._send("GetCapability", *_NO_SESSIONS, capability, first, count, more, data)
        return self._ffi.gc(data[0], self._lib.Esys_Free), bool(more[0])

    def _properties(self, group: int) -> dict[int, int]:
        """TPM_CAP_TPM_PROPERTIES of a group of 256."""
        values: dict[int, int] = {}
        first = group
        for _ in range(_MAX_ROUNDS):
            data, more = self._capability(0x6, first, 64)
            listed = list(data.data.tpmProperties.tpmProperty)[: data.data.tpmProperties.count]
            values |= {item.property: item.value for item in listed}
            if not more or not listed or max(values) >= group + 0xFF:
                break
            first = max(values) + 1
        return values

    def _handles(self, first: int) -> tuple[int, ...]:
        """TPM_CAP_HANDLES: all of the type of `first`."""
        found: list[int] = []
        for _ in range(_MAX_ROUNDS):
            data, more = self._capability(0x1, found[-1] + 1 if found else first, 64)
            listed = list(data.data.handles.handle)[: data.data.handles.count]
            found += listed
            if not more or not listed:
                break
        return tuple(found)


def bank_off() -> TpmFailed:
    """The error for a TPM that has not all PCRs in its sha256 bank."""
    return TpmFailed("the TPM's SHA-256 PCR bank is off", "turn it on in the firmware's setup", code=NO_BANK)


def pcr_refusal(selection: Sequence[int]) -> TpmRefused:
    """The error for a boot whose PCRs are in no state that the policy allows."""
    numbers = ", ".join(map(str, selection))
    return TpmRefused(f"the TPM refuses: PCRs {numbers} are in no state that the policy allows")


class _Session:
    """A session for one command."""

    __slots__ = ("_tpm", "handle")

    def __init__(self, tpm: Tpm, handle: int) -> None:
        self._tpm, self.handle = tpm, handle

    def __enter__(self) -> int:
        return self.handle

    def __exit__(self, failure: object, *_: object) -> None:
        self._tpm._end(self.handle, failure is not None)


def _load() -> tuple[Any, Any]:
    """`lib` and `ffi` of tpm2-pytss, without running the package."""
    from importlib.machinery import PathFinder

    os.environ.setdefault("TSS2_LOG", "all+none")  # libtss2 writes to stderr otherwise
    full = "tpm2_pytss._libtpm2_pytss"
    module: Any = sys.modules.get(full)
    if module is None:
        package = PathFinder.find_spec("tpm2_pytss")
        spec = PathFinder.find_spec(full, package.submodule_search_locations) if package else None
        if spec is None or spec.loader is None:
            raise TpmFailed("the library tpm2-pytss is not installed", hint="apt install python3-tpm2-pytss")
        try:
            module = spec.loader.create_module(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise TpmFailed(f"cannot load tpm2-pytss: {error}") from None
        sys.modules[full] = module
    return module.lib, module.ffi
