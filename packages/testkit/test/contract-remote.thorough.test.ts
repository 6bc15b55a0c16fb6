import { TEMPORARY_PREFIX } from '@varve/core'
import { describeDriver, NetworkProxy } from '@varve/testkit'
import { afterAll, beforeAll } from 'vitest'
import { ToyDriver } from './toy-driver.ts'
import { ToyServer } from './toy-server.ts'

const PASSWORD = 'open/sesame: 42'
/** Short, so that the tests of a silent server are; long enough for a busy machine. */
const IDLE_TIMEOUT_MS = 1500
const PATIENT_MS = 30_000

const server = new ToyServer(PASSWORD)
beforeAll(() => server.start())
afterAll(() => server.kill())

let created = 0

function toyDriver(port: number, space: string, timeoutMs: number, password = PASSWORD): ToyDriver {
  return new ToyDriver({ port, space, password, timeoutMs })
}

function createSpace(port: number, timeoutMs = PATIENT_MS) {
  const name = `space-${created++}`
  const space = server.space(name)
  return {
    name,
    driver: toyDriver(port, name, timeoutMs),
    inspect: async () => space.inspect(),
    readRaw: async (key: string) => space.objects.get(key)?.bytes ?? new Uint8Array(),
    dispose: async () => void server.spaces.delete(name),
  }
}

describeDriver('The driver of a toy server', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create: async () => createSpace(server.port),
  async leaveUnfinished({ name }) {
    server.space(name).unfinished.set(TEMPORARY_PREFIX.slice(-1), Date.now())
  },
  async neighbour({ name }) {
    server.space(`${name}2`)
    return toyDriver(server.port, `${name}2`, PATIENT_MS)
  },
  largeSize: 3_000_011,
  manyObjects: 50,
  brief: true,
  remote: {
    async create() {
      const proxy = await NetworkProxy.start({ port: server.port })
      const target = createSpace(proxy.port, IDLE_TIMEOUT_MS)
      const dispose = async () => {
        await target.dispose()
        await proxy[Symbol.asyncDispose]()
      }
      return { ...target, proxy, dispose }
    },
    async restartServer() {
      await server.kill()
      await server.start()
    },
    refused: [
      {
        what: 'a wrong password',
        code: 'STORAGE_ACCESS_DENIED',
        create: async () => toyDriver(server.port, 'space-0', PATIENT_MS, `not ${PASSWORD}`),
      },
      {
        what: 'a space that is not there',
        code: 'STORAGE_NOT_FOUND',
        create: async () => toyDriver(server.port, 'elsewhere', PATIENT_MS),
      },
    ],
    secrets: [PASSWORD],
    idleTimeoutMs: IDLE_TIMEOUT_MS,
  },
})
