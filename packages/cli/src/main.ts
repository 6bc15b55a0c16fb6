#!/usr/bin/env node
import { runCli } from './cli.ts'
import { processTerminal } from './terminal.ts'

const code = await runCli(process.argv.slice(2), processTerminal())
// All is written by now. Without this, a connection that a storage keeps would keep the finished command too.
process.exit(code)
