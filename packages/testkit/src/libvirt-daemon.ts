import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync } from 'node:fs'
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { Socket } from 'node:net'
import path from 'node:path'
import { execa } from 'execa'
import { pollUntil } from './lab-poll.ts'

/**
 * The first process of the namespaces that libvirtd and its QEMUs live in. It binds private folders over the
 * fixed paths that the privileged libvirtd uses, and over /run, so that neither the system's libvirt nor its
 * D-Bus is seen. /dev/kvm, which hangs guests on some machines, becomes a read-only file: that is what makes
 * libvirt take it for unusable, and not probe it again and again. Its standard input is the lifeline: that ends with the process that started the lab, however
 * that comes about, and once the first process of a process namespace is gone, the kernel kills all others.
 *
 * The word `stop` ends everything and leaves the folder; the end of the input removes it too.
 */
const supervisor = `
root=$1
hide_kvm() {
  [ -e /dev/kvm ] || return 0
  : > "$root/no-kvm"
  mount --bind "$root/no-kvm" /dev/kvm && mount -o remount,bind,ro /dev/kvm
}
mount --bind "$root/etc" /etc/libvirt &&
mount --bind "$root/lib" /var/lib/libvirt &&
mount --bind "$root/log" /var/log/libvirt &&
mount --bind "$root/cache" /var/cache/libvirt &&
mount --bind "$root/run" /run &&
hide_kvm || exit
(libvirtd --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirtd.pid; echo "libvirtd: $?" > /run/exit) &
# Not the shell's own read: only while it waits for a child does it reap the orphans, such as every QEMU.
head -n 1 > "$root/verb"
[ "$(cat "$root/verb")" = stop ] || rm -rf "$root"
`

const libvirtdConfig = `auth_unix_rw = "none"
auth_unix_ro = "none"
unix_sock_rw_perms = "0700"
`

// No mount namespace for each QEMU and no cgroups, which the host would share; no virtlogd. Without the capability
// libvirt asks a QEMU that starts for all features of its processor at once, and not in 400 questions, one for each,
// which take longer than all the rest of the start.
const qemuConfig = `user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
capability_filters = ["cpu-unavailable-features"]
`

/** A libvirtd and its QEMUs in namespaces of their own. */
export interface LibvirtDaemon {
  /** The URI for libvirt's clients, which live outside of the namespaces. */
  readonly uri: string
  /** Ends libvirtd alone; its domains go on. */
  stopLibvirtd(): Promise<void>
  /** Starts libvirtd again, which finds its domains. */
  startLibvirtd(): Promise<void>
  /** Ends the daemon and its domains at once, as a power cut does. With `keep` the folder stays. */
  stop(folder: 'keep' | 'remove'): Promise<void>
}

/**
 * What the first libvirtd of this process has found out about the QEMUs that are installed: the files of its cache. To find that
 * out costs more than the start of a domain.
 */
const capabilities = new Map<string, Buffer>()

async function rememberCapabilities(cache: string): Promise<void> {
  if (capabilities.size > 0) return
  for (const name of await readdir(cache).catch(() => []))
    capabilities.set(name, await readFile(path.join(cache, name)))
}

/** Starts a libvirtd whose configuration, state, sockets and logs are all below the folder `root`. */
export async function startLibvirtDaemon(root: string): Promise<LibvirtDaemon> {
  for (const name of ['etc', 'lib', 'log', 'cache', 'run']) {
    await mkdir(path.join(root, name), { recursive: true })
  }
  await writeFile(path.join(root, 'etc/libvirtd.conf'), libvirtdConfig)
  await writeFile(path.join(root, 'etc/qemu.conf'), qemuConfig)

  const cache = path.join(root, 'cache/qemu/capabilities')
  await mkdir(cache, { recursive: true })
  for (const [name, found] of capabilities) await writeFile(path.join(cache, name), found)

  const child = spawnSupervisor(root)
  const stop = async (folder: 'keep' | 'remove'): Promise<void> => {
    await rememberCapabilities(cache)
    await endSupervisor(child, folder)
    if (folder === 'remove') await rm(root, { recursive: true, force: true })
  }
  const uri = `qemu+unix:///system?socket=${root}/run/libvirt/libvirt-sock`
  try {
    await answer(uri, child, root)
  } catch (error) {
    await stop('remove')
    throw error
  }
  return {
    uri,
    stop,
    async stopLibvirtd() {
      const pid = await libvirtdOf(child)
      if (pid === undefined) throw new Error('libvirtd does not run.')
      process.kill(pid, 'SIGTERM')
      await pollUntil(
        async () => ((await libvirtdOf(child)) === undefined ? true : undefined),
        30_000,
        () => 'libvirtd does not end.',
      )
    },
    async startLibvirtd() {
      const [shell] = await childrenOf(child.pid)
      const command =
        'exec libvirtd --daemon --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirtd.pid'
      const inside = ['--target', String(shell), '--mount', '--pid', 'sh', '-c', command]
      await execa('nsenter', inside, { timeout: 30_000 })
      await pollUntil(
        () => answers(uri),
        30_000,
        () => 'libvirtd does not answer again after 30 s.',
      )
    },
  }
}

async function childrenOf(pid: number | undefined): Promise<number[]> {
  const { stdout } = await execa('pgrep', ['--parent', String(pid)], { reject: false })
  return stdout.split('\n').filter(Boolean).map(Number)
}

/** libvirtd's process id, where it runs, as it is seen from outside. */
async function libvirtdOf(supervisor: ChildProcess): Promise<number | undefined> {
  const [shell] = await childrenOf(supervisor.pid)
  const { stdout } = await execa('pgrep', ['--ns', String(shell), '--nslist', 'pid', '--exact', 'libvirtd'], {
    reject: false,
  })
  const [pid] = stdout.split('\n').filter(Boolean)
  return pid === undefined ? undefined : Number(pid)
}

function spawnSupervisor(root: string): ChildProcess {
  const log = openSync(path.join(root, 'supervisor.log'), 'a')
  const namespaces = ['--mount', '--pid', '--fork', '--kill-child', '--mount-proc']
  // Detached: Ctrl-C in a terminal is for the test, which then stops the lab.
  const child = spawn('unshare', [...namespaces, 'sh', '-c', supervisor, 'sh', root], {
    stdio: ['pipe', log, log],
    detached: true,
  })
  closeSync(log)
  child.on('error', () => undefined) // seen in answer(), which has the log
  child.stdin?.on('error', () => undefined) // the supervisor has ended by itself
  // A lab that nobody stops keeps no process alive: it ends with it.
  child.unref()
  if (child.stdin instanceof Socket) child.stdin.unref()
  return child
}

/** Waits until the daemon answers. */
async function answer(uri: string, child: ChildProcess, root: string): Promise<void> {
  const log = (): Promise<string> => readFile(path.join(root, 'supervisor.log'), 'utf8').catch(() => '')
  await pollUntil(
    async () => {
      const exited = await readFile(path.join(root, 'run/exit'), 'utf8').catch(() => '')
      if (child.pid === undefined || child.exitCode !== null || exited)
        throw new Error(`libvirtd did not start. ${exited}${await log()}`)
      return answers(uri)
    },
    30_000,
    async () => `libvirtd does not answer after 30 s. ${await log()}`,
  )
}

async function answers(uri: string): Promise<true | undefined> {
  const { exitCode } = await execa('virsh', ['--connect', uri, 'uri'], { reject: false, timeout: 10_000 })
  return exitCode === 0 ? true : undefined
}

async function endSupervisor(child: ChildProcess, folder: 'keep' | 'remove'): Promise<void> {
  if (child.pid === undefined || child.exitCode !== null || child.signalCode !== null) return
  child.ref()
  const exit = once(child, 'exit', { signal: AbortSignal.timeout(30_000) })
  child.stdin?.end(folder === 'keep' ? 'stop\n' : '')
  await exit.catch(() => child.kill('SIGKILL')) // --kill-child: the namespace goes with it
}
