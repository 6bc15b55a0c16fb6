import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { inspect } from 'node:util'
import { bytesBody, isKey, isVarveError } from '@varve/core'
import { FUZZ_TIMEOUT_MS, fuzz, PatternBody, patternBytes, troubledSource } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { FakeServer } from './fake-server.ts'
import { listed } from './ftp-target.ts'

const x = bytesBody(Buffer.from('x'))

test('data goes to the host of the control connection, whatever address the reply to PASV names', async () => {
  const { server, driver } = await FakeServer.begin()
  server.twists.EPSV = () => '500 Unknown.'
  await driver.put('a/b', x)
  expect(await buffer(await driver.get('a/b'))).toEqual(Buffer.from('x'))
  expect(server.count('EPSV')).toBe(1)
  expect(server.count('PASV')).toBe(2)
})

test.each(['229 (|||0|)', '229 (|||65536|)', '229 no port', '229 (|||-1|)'])(
  'a reply to EPSV that names no port is an error: %s',
  async reply => {
    const { server, driver } = await FakeServer.begin()
    server.twists.EPSV = () => reply
    await expect(driver.put('a', x)).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
  },
)

test('a server with MLSD is not asked for the time of each file', async () => {
  const { server, driver } = await FakeServer.begin()
  server.features.push('MLST type*;size*;modify*;')
  for (const key of ['a', 'b/c', 'b/.hidden', 'b/ leading']) await driver.put(key, x)
  const objects = await listed(driver)
  expect(objects.map(({ key }) => key).sort()).toEqual(['a', 'b/ leading', 'b/.hidden', 'b/c'])
  expect(server.count('MDTM')).toBe(0)
  for (const object of objects) expect(object).toEqual(await driver.stat(object.key))
  expect(objects[0]?.modifiedAt).toEqual(new Date('2024-02-29T12:34:56Z'))
})

test('a server that knows no options of LIST is listed without them', async () => {
  const { server, driver } = await FakeServer.begin()
  server.twists.LIST = options => (options === '' ? undefined : '501 No options.')
  await driver.put('a/b', x)
  expect(await listed(driver)).toMatchObject([{ key: 'a/b', size: 1 }])
})

test('a server that tells no times lists objects without them, and nothing is cleaned up there', async () => {
  const { server, driver } = await FakeServer.begin()
  server.features = ['SIZE']
  await driver.put('a', x)
  server.files.set('/.varve-part-old', Buffer.from('old'))
  expect(await listed(driver)).toEqual([{ key: 'a', size: 1 }])
  expect(await driver.cleanUp({ olderThan: new Date() })).toBe(0)
})

test.each([
  ['452 Insufficient space', 'STORAGE_FULL'],
  ['552 Quota exceeded', 'STORAGE_FULL'],
  ['451 Failure writing to local file.', 'STORAGE_FULL'],
  ['550 Permission denied.', 'STORAGE_ACCESS_DENIED'],
])('an upload that ends with "%s" is %s, and nothing is left', async (reply, code) => {
  const { server, driver } = await FakeServer.begin()
  server.twists['end of STOR'] = () => reply
  await expect(driver.put('a/b', x)).rejects.toMatchObject({ code, retryable: false })
  expect([...server.files.keys(), ...server.folders]).toEqual(['/'])
})

test.each([1, 300_000])('an onProgress that throws at byte %d fails the upload with that', async least => {
  const { server, driver } = await FakeServer.begin()
  server.twists['end of STOR'] = () => '426 Broken off.'
  const boom = new Error('boom')
  let thrown = false
  const onProgress = (bytes: number) => {
    if (thrown || bytes < least) return
    thrown = true
    throw boom
  }
  const body = new PatternBody({ size: 300_000, seed: 3 })
  await expect(driver.put('a/b', body, { onProgress })).rejects.toBe(boom)
  expect(server.count('STOR')).toBe(1)
  expect([...server.files.keys(), ...server.folders]).toEqual(['/'])
})

test('a server that says it has all but does not is found out, and the upload begins again', async () => {
  const { server, driver } = await FakeServer.begin()
  let cut = 0
  server.twists['end of STOR'] = path => {
    if (cut++ === 0) server.files.set(path, server.files.get(path)?.subarray(0, 1000) ?? Buffer.alloc(0))
    return undefined
  }
  const body = new PatternBody({ size: 300_000, seed: 3 })
  await driver.put('a', body)
  expect(server.files.get('/a')?.equals(patternBytes(3, 0, 300_000))).toBe(true)
  expect(server.commands).toContain('REST 1000')
})

test('a stream whose end the server lost is a failed upload, and leaves nothing', async () => {
  const { server, driver } = await FakeServer.begin()
  server.twists['end of STOR'] = path => {
    server.files.set(path, server.files.get(path)?.subarray(0, -1) ?? Buffer.alloc(0))
    return undefined
  }
  await expect(driver.put('a', Readable.from([Buffer.alloc(1000)]))).rejects.toMatchObject({
    code: 'UPLOAD_FAILED',
  })
  expect(server.files.size).toBe(0)
})

test('an upload whose size on the server never is right fails, and leaves nothing', async () => {
  const { server, driver } = await FakeServer.begin({ attempts: 3 })
  server.twists['end of STOR'] = path => {
    server.files.set(path, Buffer.alloc(2000))
    return undefined
  }
  await expect(driver.put('a', bytesBody(Buffer.alloc(1000)))).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringContaining('2000'),
  })
  expect(server.count('STOR')).toBe(3)
  expect(server.files.size).toBe(0)
})

test('a server that does not continue uploads gets them again from the beginning', async () => {
  const { server, driver } = await FakeServer.begin()
  const size = 3_000_000
  let broken = 0
  server.twists.STOR = (_, session) => {
    if (session.offset > 0) return '451 Append/Restart not permitted.'
    if (broken++ === 0) setTimeout(() => session.control.resetAndDestroy(), 20)
    return undefined
  }
  await driver.put('a', slowBody(size))
  expect(server.files.get('/a')?.equals(patternBytes(0, 0, size))).toBe(true)
})

test.each([
  ['that begins the file', 0],
  ['that continues the file', 300_000],
])(
  'an upload is whole where a lost STOR %s is carried out late, and nothing else stays',
  async (_, least) => {
    const { server, driver } = await FakeServer.begin()
    const size = 1_000_000
    const lost = loseStore(server, least)
    await driver.put('a', slowBody(size))
    expect(lost.path).not.toBe('')
    expect(lost.late).toBe(true)
    expect([...server.files.keys()]).toEqual(['/a'])
    expect(server.files.get('/a')?.equals(patternBytes(0, 0, size))).toBe(true)
  },
)

test('a body that opens once is not continued in a file to which a STOR has no reply', async () => {
  const { server, driver } = await FakeServer.begin()
  const going = Promise.withResolvers<void>()
  server.twists.STOR = (_, { offset, control }) => {
    if (offset === 0) return undefined
    if (server.count('STOR') > 2) going.resolve()
    else control.resetAndDestroy()
    return server.count('STOR') > 2 ? undefined : ''
  }
  server.twists['chunk of STOR'] = (path, { control }) => {
    setImmediate(() => server.files.get(path)?.length === 1000 && control.write('426 Too slow.\r\n'))
    return undefined
  }
  server.twists['end of STOR'] = () => ''
  const source = troubledSource({ kind: 'wait', resumed: going.promise, size: 2000 }, { bytes: 1000 })
  await expect(driver.put('a', source)).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
  expect(server.count('STOR')).toBe(2)
  expect([...server.files.keys()]).toEqual([])
})

/**
 * Loses the first STOR at `least` bytes or later, with its connection; an earlier one breaks off there. It is carried out when
 * another one has stored half a million.
 */
function loseStore(server: FakeServer, least: number) {
  const lost = { path: '', offset: 0, late: false }
  server.twists.STOR = (path, { offset, control }) => {
    if (lost.path !== '' || offset < least) return undefined
    Object.assign(lost, { path, offset })
    control.resetAndDestroy()
    return ''
  }
  server.twists['chunk of STOR'] = (path, { control }) => {
    const stored = server.files.get(path)?.length ?? 0
    if (lost.path === '' && stored >= least) control.resetAndDestroy()
    if (lost.path === '' || lost.late || stored < 500_000) return undefined
    lost.late = true
    const file = server.files.get(lost.path) ?? Buffer.alloc(0)
    server.files.set(lost.path, file.subarray(0, lost.offset))
    return undefined
  }
  return lost
}

test('a rename whose reply is lost counts when it has come about', async () => {
  const { server, driver } = await FakeServer.begin()
  let lost = 0
  server.twists.RNTO = (argument, session) => {
    if (lost++ > 0) return undefined
    const [from = ''] = server.files.keys()
    server.files.set(argument, server.files.get(from) ?? Buffer.alloc(0))
    server.files.delete(from)
    session.control.resetAndDestroy()
    return ''
  }
  await driver.put('a', bytesBody(Buffer.from('once')))
  expect(server.count('STOR')).toBe(1)
  expect([...server.files]).toEqual([['/a', Buffer.from('once')]])
})

test('a rename that is lost with its reply is made again', async () => {
  const { server, driver } = await FakeServer.begin()
  let lost = 0
  server.twists.RNTO = (_, session) => {
    if (lost++ > 0) return undefined
    session.control.resetAndDestroy()
    return ''
  }
  await driver.put('a', bytesBody(Buffer.from('once')))
  expect(server.count('STOR')).toBe(1)
  expect([...server.files]).toEqual([['/a', Buffer.from('once')]])
})

test('a rename that is lost is made again, and nothing sent, also where the server continues no uploads', async () => {
  const { server, driver } = await FakeServer.begin()
  server.features = ['SIZE']
  let lost = 0
  server.twists.RNTO = (_, session) => {
    if (lost++ > 0) return undefined
    session.control.resetAndDestroy()
    return ''
  }
  await driver.put('a', bytesBody(Buffer.from('once')))
  expect(server.count('STOR')).toBe(1)
  expect([...server.files]).toEqual([['/a', Buffer.from('once')]])
})

test('a rename whose reply is lost is a success if the object is there and no attempt is left', async () => {
  const { server, driver } = await FakeServer.begin({ attempts: 1 })
  loseRename(server)
  expect(await driver.put('a/b', bytesBody(Buffer.from('once')))).toMatchObject({ key: 'a/b', size: 4 })
  expect([...server.files]).toEqual([['/a/b', Buffer.from('once')]])
})

test('a rename whose reply is lost is a failure if the object is another one', async () => {
  const { server, driver } = await FakeServer.begin({ attempts: 1 })
  loseRename(server, path => server.files.set(path, Buffer.from('of somebody else')))
  const upload = driver.put('a/b', bytesBody(Buffer.from('once')))
  await expect(upload).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
  expect([...server.files.values()]).toEqual([Buffer.from('of somebody else')])
})

test('a rename whose reply is lost is told to be unknown where the server takes no more connections', async () => {
  const { server, driver } = await FakeServer.begin({ attempts: 1 })
  loseRename(server, () => {
    server.twists.USER = () => '421 Not now.'
  })
  await expect(driver.put('a/b', bytesBody(Buffer.from('once')))).rejects.toMatchObject({
    code: 'STORAGE_UNREACHABLE',
    message: expect.stringContaining('Whether a/b is stored all the same is not known'),
  })
})

test('an upload that was removed is no success because a former object has its size', async () => {
  const { server, driver } = await FakeServer.begin({ attempts: 2 })
  server.files.set('/a/b', Buffer.from('four'))
  server.folders.add('/a')
  server.twists.RNTO = () => '550 Permission denied.'
  const upload = () => driver.put('a/b', bytesBody(Buffer.from('once')))
  await expect(upload()).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })

  let lost = 0
  server.twists.DELE = (_, session) => {
    if (lost++ > 0) return undefined
    for (const path of server.files.keys()) if (path.includes('.varve-part-')) server.files.delete(path)
    session.control.resetAndDestroy()
    return ''
  }
  await expect(upload()).rejects.toMatchObject({
    code: 'STORAGE_ACCESS_DENIED',
    message: expect.stringContaining('Whether a/b is stored all the same is not known'),
  })
  expect([...server.files]).toEqual([['/a/b', Buffer.from('four')]])
})

/** Gives a file its name, and breaks the connection before it says so. */
function loseRename(server: FakeServer, after: (path: string) => void = () => undefined): void {
  server.twists.RNTO = (argument, session) => {
    const [from = ''] = server.files.keys()
    const path = argument.startsWith('/') ? argument : `/${argument}`
    server.files.set(path, server.files.get(from) ?? Buffer.alloc(0))
    server.files.delete(from)
    after(path)
    session.control.resetAndDestroy()
    return ''
  }
}

test.each([
  ['shorter', 90],
  ['longer', 110],
])('a download that is %s than the object was fails', async (_, length) => {
  const { server, driver } = await FakeServer.begin()
  server.files.set('/a', Buffer.alloc(length))
  server.twists.SIZE = () => '213 100'
  await expect(buffer(await driver.get('a'))).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    retryable: true,
  })
})

test('an empty folder and an empty object are read also where their end comes before the reply', async () => {
  const { server, driver } = await FakeServer.begin({ attempts: 1 })
  await driver.put('empty', bytesBody(new Uint8Array()))
  server.folders.add('/a')
  server.dataFirst = true
  expect(await listed(driver, 'a/')).toEqual([])
  expect(await buffer(await driver.get('empty'))).toHaveLength(0)
})

test('a listing comes over the control connection where STAT gives it, since that has an end mark', async () => {
  const { server, driver } = await FakeServer.begin()
  await driver.put('a', x)
  const file = '-rw-r--r--   1 some one  1 Feb 29  2024'
  const folder = 'drwxr-xr-x   1 some one  4096 Feb 29  2024'
  server.twists.STAT = () =>
    ['213-Status:', `${file} a`, `${file}  213 end`, `${folder} .`, `${folder} ..`, '213 End.'].join('\r\n')
  expect(await listed(driver)).toMatchObject([{ key: 'a' }]) // the other one has no time, so it has gone
  expect(server.count('LIST')).toBe(0)
  expect(server.count('EPSV')).toBe(1) // for the upload
})

test.each([
  '500 Unknown.',
  '211-Status of the server:\r\n Fine.\r\n211 End.',
  '213-Status:\r\n213 End.',
  '450 No such file: -a',
])('a server whose STAT gives no listing is asked for it once: %j', async reply => {
  const { server, driver } = await FakeServer.begin()
  await driver.put('a/b', x)
  server.twists.STAT = () => reply
  for (let turn = 0; turn < 2; turn++) expect(await listed(driver)).toMatchObject([{ key: 'a/b' }])
  expect(server.count('STAT')).toBe(1)
})

test.each([[[]], [['MLST type*;size*;modify*;']]])(
  'a listing that ends within a line is an error, with the features %j',
  async features => {
    const { server, driver } = await FakeServer.begin({ attempts: 2 })
    server.features.push(...features)
    await driver.put('object-1', x)
    await driver.put('object-2', x)
    server.listingLacks = 4
    await expect(listed(driver)).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE', retryable: true })
    expect(server.count('CWD')).toBe(2)
    server.listingLacks = 0
    expect(await listed(driver)).toHaveLength(2)
  },
)

test('a server that sends the password back does not get it into an error', async () => {
  const { server, driver } = await FakeServer.begin()
  server.twists.PASS = password => `530 Not ${password}, sorry.`
  const error = await driver.stat('a').catch(error => error)
  expect(isVarveError(error, 'STORAGE_ACCESS_DENIED') && error.message).toContain('Not ***, sorry')
  expect(inspect(error, { depth: 12 })).not.toContain('pa55word')
})

test('a wrong password is tried once', async () => {
  const { server, driver } = await FakeServer.begin()
  server.twists.PASS = () => '530 No.'
  await expect(driver.put('a', x)).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
  expect(server.count('PASS')).toBe(1)
})

test('a server that is no FTP server is told so in one line', async () => {
  const { server, driver } = await FakeServer.begin({ attempts: 1 })
  server.twists.PWD = () => '257 nothing\u001b[31m here'
  const error = await driver.stat('a').catch(error => error)
  expect(error).toMatchObject({ name: 'VarveError', code: 'STORAGE_FAILED' })
  expect(error.message).toContain('257 nothing [31m here. Is it')
})

/** A body that gives its bytes a little at a time, so that a transfer can be broken in its middle. */
function slowBody(size: number) {
  const body = new PatternBody({ size, chunkSize: 50_000 })
  return {
    size,
    replayable: true,
    open: (range?: { start: number; end: number }) =>
      Readable.from(
        (async function* () {
          for await (const chunk of body.open(range)) {
            await new Promise(resolve => setTimeout(resolve, 1))
            yield chunk
          }
        })(),
      ),
  }
}

test('a mangled listing is refused, or gives objects', { timeout: FUZZ_TIMEOUT_MS }, async () => {
  const { server, driver } = await FakeServer.begin({ attempts: 1 })
  let lines: string[] = []
  let found = 0
  server.twists.MDTM = () => '213 20240229123456'
  const folder = 'drwxr-xr-x   1 some one  4096 Feb 29  2024 .'
  server.twists.STAT = () => ['213-Status:', folder, ...lines, '213 End.'].join('\r\n')
  const odd = fc.string({ unit: fc.constantFrom(...'ab -;/=%\\\t.<>0') })
  // mostly right, or a listing with anything right in it would be rare
  const part = (right: string, ...words: string[]) =>
    fc.oneof(
      { weight: 16, arbitrary: fc.constant(right) },
      { weight: 8, arbitrary: fc.constantFrom(right, ...words) },
      odd,
    )
  const line = fc
    .tuple(
      part('-rw-r--r--', 'drwxr-xr-x', 'lrwxrwxrwx', '----------'),
      part('   1 some one  '),
      part('1', '0', '-5', '1.5', '9'.repeat(400), '9007199254740993', 'NaN'),
      part(' Feb 29  2024 ', ' Feb 29 12:34 ', ' Xyz 99 99:99 '),
      part('a', 'b -> c', '..', '.', '../x', '/etc/passwd', 'a\\b', ''),
    )
    .map(parts => parts.join(''))
  await fc.assert(
    fc.asyncProperty(fc.array(line, { maxLength: 4 }), async mangled => {
      lines = mangled
      const objects = await listed(driver).catch(error => {
        expect(error).toMatchObject({ name: 'VarveError' })
        return []
      })
      found += objects.length
      for (const { key, size } of objects) {
        expect(isKey(key)).toBe(true)
        expect(Number.isSafeInteger(size) && size >= 0, `${size}`).toBe(true)
      }
    }),
    fuzz(100),
  )
  expect(found).toBeGreaterThan(10) // else this would show nothing
})
