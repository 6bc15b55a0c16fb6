/** Starts a lab with a running domain, prints its folder, and waits to be killed. */
import path from 'node:path'
import { createRaw, startLibvirt } from '../src/lab.ts'

const lab = await startLibvirt()
const disk = path.join(lab.root, 'disk.raw')
await createRaw(disk, 1024 * 1024)
const vm = await lab.createDomain({
  name: 'orphan',
  guest: false,
  disks: [{ target: 'vda', path: disk, format: 'raw' }],
})
await vm.start()
console.log(lab.root)
setInterval(() => undefined, 60_000)
