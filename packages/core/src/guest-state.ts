import { setTimeout as sleep } from 'node:timers/promises'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import { isRunning, type LibvirtDomains } from './libvirt-domains.ts'
import type { RunOptions } from './run-options.ts'

/** How long a suspend may take, in milliseconds: as long as the storage of the guest's disks lets its writes wait. */
const SUSPEND_TIMEOUT_MS = 10 * 60_000
/** How long a suspend may be on its way to libvirt whose asker has died, in milliseconds. */
const SUSPEND_ARRIVAL_MS = 5_000
/** How long the guest agent may take to flush and freeze, in milliseconds. */
const FREEZE_TIMEOUT_MS = 60_000

/** See {@link Host.freezeFilesystems}. */
export async function freezeFilesystems(
  domains: LibvirtDomains,
  instance: string,
  run: RunOptions,
): Promise<void> {
  try {
    await domains.virsh.onDomain({ ...run, timeoutMs: FREEZE_TIMEOUT_MS }, instance, 'domfsfreeze')
  } catch (error) {
    if (isVarveError(error, 'ABORTED')) throw error
    const stderr = isVarveError(error) ? String(error.context.stderr) : ''
    const agent = !/agent is not (configured|connected)/i.test(stderr)
    throw new VarveError(
      'FREEZE_FAILED',
      `The guest agent of ${instance} did not freeze its file systems: ${errorMessage(error)}. Check that qemu-guest-agent runs in the guest, or back up without a freeze.`,
      { context: { instance, agent }, cause: error, retryable: true },
    )
  }
}

/** See {@link Host.thawFilesystems}. */
export async function thawFilesystems(
  domains: LibvirtDomains,
  instance: string,
  run: RunOptions,
): Promise<void> {
  // A guest that stays frozen is worse than a failed backup, so this is tried for a while.
  for (let attempt = 1; ; attempt++) {
    try {
      await domains.virsh.onDomain({ ...run, timeoutMs: FREEZE_TIMEOUT_MS }, instance, 'domfsthaw')
      return
    } catch (error) {
      // Whether it runs is asked only now: until then the guest would stand still.
      if (isVarveError(error, 'INSTANCE_NOT_FOUND') || (await isOff(domains, instance, run))) return
      const stderr = isVarveError(error) ? String(error.context.stderr) : ''
      if (/agent is not configured/i.test(stderr)) return // so it has frozen nothing
      if (attempt === 5) {
        throw new VarveError(
          'FREEZE_FAILED',
          `The file systems of ${instance} could not be thawed: ${errorMessage(error)}. Run "virsh domfsthaw ${instance}" at once: the guest cannot write until then.`,
          {
            context: { instance },
            cause: error,
            retryable: true,
          },
        )
      }
      await sleep(attempt * 500)
    }
  }
}

/** Whether an instance is off, or gone, as far as libvirt answers. */
async function isOff(domains: LibvirtDomains, instance: string, run: RunOptions): Promise<boolean> {
  return domains.isRunning(instance, run).then(
    running => !running,
    error => isVarveError(error, 'INSTANCE_NOT_FOUND'),
  )
}

/** See {@link Host.suspend}. */
export async function suspend(domains: LibvirtDomains, instance: string, run: RunOptions): Promise<boolean> {
  if (await isPaused(domains, instance, run)) return false
  // Without the signal: libvirt would go on with it, and nobody could resume the guest before it is done.
  const whole = { ...(run.onEvent && { onEvent: run.onEvent }), timeoutMs: SUSPEND_TIMEOUT_MS }
  await domains.virsh.onDomain(whole, instance, 'suspend')
  return true
}

/** See {@link Host.isPaused}. */
export async function isPaused(domains: LibvirtDomains, instance: string, run: RunOptions): Promise<boolean> {
  return ['paused', 'pmsuspended'].includes(await domains.state(instance, run))
}

/** See {@link Host.resume}. */
export async function resume(domains: LibvirtDomains, instance: string, run: RunOptions): Promise<void> {
  // Whatever the state is: a suspend that is under way would come after the look at it.
  const startedAt = performance.now()
  for (let attempt = 1; ; attempt++) {
    try {
      await domains.virsh.onDomain({ ...run, timeoutMs: FREEZE_TIMEOUT_MS }, instance, 'resume')
      return
    } catch (error) {
      const stderr = isVarveError(error) ? String(error.context.stderr) : ''
      if (isVarveError(error, 'INSTANCE_NOT_FOUND') || /domain is (not running|pmsuspended)/i.test(stderr))
        return
      const waited = performance.now() - startedAt
      if (/domain is already running/i.test(stderr) && waited > SUSPEND_ARRIVAL_MS) return
      if (waited > SUSPEND_TIMEOUT_MS) {
        throw new VarveError(
          'RESUME_FAILED',
          `${instance} could not be resumed: ${errorMessage(error)}. Run "virsh resume ${instance}" at once: its guest stands still until then.`,
          { context: { instance }, cause: error, retryable: true },
        )
      }
      await sleep(Math.min(attempt, 10) * 500)
    }
  }
}

/** See {@link Host.powerOff}. */
export async function powerOff(
  domains: LibvirtDomains,
  instance: string,
  timeoutMs: number,
  run: RunOptions,
): Promise<void> {
  // Once the guest was asked to go it goes, also after an abort: whoever starts it again must find it off.
  const { signal, ...rest } = run
  if (signal?.aborted) throw abortError(signal)
  try {
    const asked = await askToShutDown(domains, instance, rest)
    if (!(await waitUntilOff(domains, instance, asked ? timeoutMs : 0, rest))) {
      if (signal?.aborted) throw abortError(signal) // a guest that does not react goes on
      await domains.virsh.onDomain(rest, instance, 'destroy')
    }
  } catch (error) {
    // It may have gone by itself in between.
    if (!isVarveError(error, 'COMMAND_FAILED')) throw error
    if (await domains.isRunning(instance, rest)) {
      throw new VarveError(
        'POWER_OFF_FAILED',
        `${instance} could not be switched off: ${error.message} Switch it off by hand and restore again; its disks are untouched.`,
        { context: { instance }, cause: error },
      )
    }
  }
  if (signal?.aborted) throw abortError(signal)
}

/** See {@link Host.waitUntilOff}. */
export async function waitUntilOff(
  domains: LibvirtDomains,
  instance: string,
  timeoutMs: number,
  run: RunOptions,
): Promise<boolean> {
  const deadline = performance.now() + timeoutMs
  let state = await domains.state(instance, run)
  while (isRunning(state)) {
    if (performance.now() >= deadline) return false
    state = await domains.nextState(instance, state, run)
  }
  return true
}

/** Whether it was asked. A paused guest, for one, cannot be, nor one that is off. */
async function askToShutDown(domains: LibvirtDomains, instance: string, run: RunOptions): Promise<boolean> {
  try {
    await domains.virsh.onDomain(run, instance, 'shutdown')
    return true
  } catch (error) {
    // Not where libvirt was away for a moment: whoever was not asked is switched off at once.
    if (isVarveError(error, 'COMMAND_FAILED') && !error.retryable) return false
    throw error
  }
}
