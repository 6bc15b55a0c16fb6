import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import ssh2 from 'ssh2'
import { describe, expect, test } from 'vitest'
import { FakeServer } from './fake-server.ts'

const { FAILURE } = ssh2.utils.sftp.STATUS_CODE
const FORMER = Buffer.from('the former')
const NEW = Buffer.from('the new one')

describe('an object that is replaced on a server that renames over nothing', () => {
  test('is the new one, and nothing else stays', async () => {
    const { server, driver } = await replacing()
    await driver.put('a/b', bytesBody(NEW))
    expect([...server.files]).toEqual([['/a/b', NEW]])
  })

  test('stays where the new one does not get its name', async () => {
    const { server, driver } = await replacing()
    server.twists.RENAME = (from = '') => (from === temporary(server, NEW) ? FAILURE : undefined)
    await expect(driver.put('a/b', bytesBody(NEW))).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
    expect([...server.files]).toEqual([['/a/b', FORMER]])
  })

  test('stays under a name that the error tells where it does not get its own back', async () => {
    const { server, driver } = await replacing()
    server.twists.RENAME = (_, to) => (to === '/a/b' ? FAILURE : undefined)
    const error = await driver.put('a/b', bytesBody(NEW)).catch(error => error)
    expect([...server.files]).toEqual([[expect.stringMatching(/^\/a\/\.varve-part-/), FORMER]])
    expect(error).toMatchObject({
      code: 'STORAGE_FAILED',
      message: expect.stringContaining(`kept as ${temporary(server, FORMER)?.slice(1)}`),
    })
  })

  test('is the new one where the connection breaks in between', async () => {
    const { server, driver } = await replacing()
    let cut = false
    server.twists.RENAME = (_, to = '') => {
      if (cut || to !== '/a/b' || server.files.has(to)) return undefined
      cut = true
      server.cut()
      return 'silence'
    }
    await driver.put('a/b', bytesBody(NEW))
    expect(cut).toBe(true)
    expect([...server.files]).toEqual([['/a/b', NEW]])
  })

  test('is one of many that are put at once', async () => {
    const { server, driver } = await replacing()
    const bodies = Array.from({ length: 8 }, (_, index) => Buffer.from(`body ${index}`))
    await Promise.all(bodies.map(bytes => driver.put('a/b', bytesBody(bytes))))
    expect([...server.files.keys()]).toEqual(['/a/b'])
    const stored = await buffer(await driver.get('a/b'))
    expect(bodies.some(bytes => bytes.equals(stored))).toBe(true)
  })
})

/** A server that has an object. */
async function replacing() {
  const { server, driver } = await FakeServer.begin()
  server.folders.add('/a')
  server.files.set('/a/b', FORMER)
  return { server, driver }
}

/** The temporary name under which there are these bytes. */
function temporary(server: FakeServer, bytes: Buffer): string | undefined {
  const found = [...server.files].find(([name, file]) => name.includes('.varve-part-') && file.equals(bytes))
  return found?.[0]
}
