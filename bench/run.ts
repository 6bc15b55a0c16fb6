/**
 * Measures Varve beside its peers on the same data and prints a table; see docs/performance.md.
 *
 *   npm run bench -- [--quick] [--only name,name] [--pairs 3] [--dir /dev/shm]
 */
import { execFileSync } from 'node:child_process'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { cpus } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { cases, type Figure, type Setting } from './cases.ts'

const { values } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    only: { type: 'string' },
    pairs: { type: 'string' },
    dir: { type: 'string', default: '/dev/shm' },
  },
})

const GiB = 2 ** 30
const only = values.only?.split(',')
const folder = await mkdtemp(join(values.dir, 'varve-bench-'))
const setting: Setting = {
  folder,
  pairs: Number(values.pairs ?? (values.quick ? 1 : 3)),
  diskBytes: values.quick ? GiB : 8 * GiB,
  dataBytes: values.quick ? GiB * 0.375 : 3 * GiB,
}
const figures: Figure[] = []
try {
  for (const [name, measure] of Object.entries(cases)) {
    if (only && !only.includes(name)) continue
    console.error(`==> ${name}`)
    const place = join(folder, name)
    await mkdir(place)
    figures.push(...(await measure({ ...setting, folder: place })))
    await rm(place, { recursive: true })
  }
} finally {
  await rm(folder, { recursive: true, force: true })
}

const version = (command: string) => execFileSync(command, ['--version'], { encoding: 'utf8' }).split('\n')[0]
const report = {
  at: new Date().toISOString(),
  machine: { cpu: cpus()[0]?.model, cores: cpus().length, node: process.version, qemu: version('qemu-img') },
  setting: { ...setting, folder: values.dir },
  figures,
}
const results = new URL('./results/', import.meta.url)
await mkdir(results, { recursive: true })
const file = new URL(`${report.at.replace(/[:.]/g, '-')}.json`, results)
await writeFile(file, `${JSON.stringify(report, undefined, 2)}\n`)

console.log(`| figure | Varve | peer | ratio | aim | met |\n| --- | ---: | ---: | ---: | ---: | --- |`)
for (const { name, varve, peer, value, aim, met } of figures) {
  console.log(
    `| ${[name, varve ?? '', peer ?? '', value, aim, met === undefined ? '' : met ? 'yes' : 'no'].join(' | ')} |`,
  )
}
console.error(`All runs: ${file.pathname}`)
