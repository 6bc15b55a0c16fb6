import { once } from 'node:events'
import { type LabDomain, mountTmpfs, qemuIo, sha256Content, type Tmpfs } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { LibvirtHost } from '../src/libvirt-host.ts'
import type { StoredObject } from '../src/storage.ts'
import { MiB, PausingStorage, useVmSite } from './vm-site.ts'

let small: Tmpfs
// Before the lab, whose libvirt sees what was mounted when it started.
beforeAll(async () => {
  small = await mountTmpfs('size=24m')
})
afterAll(() => small.dispose())

const site = useVmSite()

/** The guest writes a lot while an object is stored, which takes until the backup is given up. */
class SlowStorage extends PausingStorage {
  vm: LabDomain | undefined
  slow = ''

  override async put(...args: Parameters<PausingStorage['put']>): Promise<StoredObject> {
    const [key, , { signal } = {}] = args
    if (key.endsWith(this.slow) && signal) {
      await this.vm?.io('vda', 'write -P 0x22 1M 12M')
      if (!signal.aborted) await once(signal, 'abort')
    }
    return super.put(...args)
  }
}

test.each(['vda.qcow2', 'manifest.json'])(
  'a backup is given up before its overlay has no room left, also while %s is stored, and the guest goes on with all it wrote',
  async slow => {
    const vm = await site.createVm([{ target: 'vda', size: 16 * MiB }])
    await vm.start()
    await vm.io('vda', 'write -P 0x11 0 2M')
    const storage = new SlowStorage({ path: site.storagePath })
    Object.assign(storage, { vm, slow })
    const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: small.path })
    const pipeline = new BackupPipeline({ host, storage, stateDir: site.stateDir })
    await expect(pipeline.run({ instance: vm.name, overlayReserve: 16 * MiB })).rejects.toMatchObject({
      code: 'OVERLAY_SPACE_LOW',
      message: expect.stringMatching(/merged back.*overlayFolder/s),
      context: { folder: small.path },
      retryable: true,
    })
    expect(await vm.state()).toBe('running')
    await site.expectCleanHost([])

    // Without the need to keep so much there is room, and the next backup has it all.
    const manifest = await site.backup({ overlayReserve: MiB })
    const restored = await site.restored(manifest)
    await vm.destroy()
    await qemuIo(restored, 'qcow2', ['read -P 0x11 0 1M', 'read -P 0x22 1M 12M'])
    expect(await sha256Content(restored, 'qcow2')).toBe(await sha256Content(site.image('vda'), 'qcow2'))
  },
)

test('a backup does not begin where its overlay would have too little room', async () => {
  const vm = await site.createVm([{ target: 'vda', size: 16 * MiB }])
  await vm.start()
  const host = new LibvirtHost({ uri: site.lab.uri, overlayFolder: small.path })
  const pipeline = new BackupPipeline({ host, storage: site.storage, stateDir: site.stateDir })
  await expect(pipeline.run({ instance: vm.name, overlayReserve: 25 * MiB })).rejects.toMatchObject({
    code: 'OVERLAY_SPACE_LOW',
    context: { folder: small.path, needed: 25 * MiB },
  })
  await site.expectCleanHost([])
  await pipeline.run({ instance: vm.name }) // 5 % of 24 MiB are kept free
})
