#!/usr/bin/env node
import { processTerminal } from './terminal.ts'

const [major] = process.versions.node.split('.').map(Number)
if (major === undefined || major < 22) {
  process.stderr.write(`Error: varve needs Node.js 22 or later, and this is ${process.version}.\n`)
  process.exit(1)
}
// Only now, as what follows cannot even be loaded by an older one.
const { runCli } = await import('./cli.ts')
const code = await runCli(process.argv.slice(2), processTerminal())
// All is written by now. Without this, a connection that a storage keeps would keep the finished command too.
process.exit(code)
