import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { type Contract, expectStored } from './contract-target.ts'
import { patternBytes } from './pattern.ts'
import { childProcesses, filesOpenForWriting } from './process-files.ts'
import { beginRemote, type Remote } from './remote-target.ts'
import { troubledSource } from './troubled-source.ts'

/** What is uploaded goes to the server as it comes, and over no local disk. */
export function describeStaging(contract: Contract, remote: Remote): void {
  if (process.platform !== 'linux') return // what is open is looked up in /proc
  test('an upload is staged on no local disk', async () => {
    const target = await beginRemote(remote)
    const usual = tmpdir()
    const temporary = await mkdtemp(join(usual, 'varve-staging-'))
    const { TMPDIR } = process.env
    process.env.TMPDIR = temporary
    onTestFinished(async () => {
      if (TMPDIR === undefined) delete process.env.TMPDIR
      else process.env.TMPDIR = TMPDIR
      await rm(temporary, { recursive: true })
    })

    const before = await filesOpenForWriting('self')
    const seen = Promise.withResolvers<void>()
    const lookAround = async () => {
      expect(await readdir(temporary, { recursive: true }), 'files in the temporary folder').toEqual([])
      const opened = (await filesOpenForWriting('self')).filter(path => !before.includes(path))
      expect(opened, 'files that this process has open for writing').toEqual([])
      // a program may have to write elsewhere: a storage that is a folder
      for (const pid of await childProcesses()) {
        const spooled = (await filesOpenForWriting(pid)).filter(path => dirname(path) === usual)
        expect(spooled, 'temporary files that a program has open for writing').toEqual([])
      }
    }
    const size = contract.largeSize
    const source = troubledSource(
      { kind: 'wait', resumed: seen.promise, size },
      { bytes: Math.floor(size / 2), onTaken: () => lookAround().then(seen.resolve, seen.reject) },
    )
    const upload = target.driver.put('a/large', source)
    await Promise.all([seen.promise, upload])
    await expectStored(target, 'a/large', patternBytes(0, 0, size))
    expect(await readdir(temporary, { recursive: true })).toEqual([])
  })
}
