// SPDX-License-Identifier: Apache-2.0

// What Kubernetes' JavaScript client does in a test of the lab. Prints, as JSON, the
// results. Arguments: a kubeconfig, a pod, a port of it that echoes.

import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import net from 'node:net';
import { PassThrough, Readable } from 'node:stream';
import { CoreV1Api, Exec, KubeConfig, PortForward, Watch } from '@kubernetes/client-node';

const [kubeconfig, pod, port] = process.argv.slice(2);
const config = new KubeConfig();
// The client asks a socks5 proxy for addresses only. This machine is not on the tailnet.
config.loadFromString(readFileSync(kubeconfig, 'utf8').replace('socks5://', 'socks5h://'));

const { version } = JSON.parse(readFileSync(new URL('node_modules/@kubernetes/client-node/package.json', import.meta.url)));
const result = { client: `@kubernetes/client-node ${version}` };
const pods = await config.makeApiClient(CoreV1Api).listNamespacedPod({ namespace: 'default' });
result.list = pods.items.map((p) => p.metadata.name);

result.watch = await new Promise((resolve, reject) => {
  new Watch(config).watch('/api/v1/namespaces/default/pods', {}, resolve, reject);
});

const stdout = new PassThrough();
const status = await new Promise((resolve, reject) => {
  new Exec(config)
    .exec('default', pod, 'main', ['sh', '-c', 'read line; echo got $line; exit 3'], stdout, process.stderr, Readable.from(['hello\n']), false, resolve)
    .catch(reject);
});
result.exec = String(stdout.read());
result.code = Number(status.details.causes.find((c) => c.reason === 'ExitCode').message);

const server = net.createServer((socket) => new PortForward(config).portForward('default', pod, [Number(port)], socket, null, socket));
server.listen(0, '127.0.0.1');
await once(server, 'listening');
const tunnel = net.connect(server.address().port, '127.0.0.1');
tunnel.write('hello');
result.portforward = String((await once(tunnel, 'data'))[0]);
console.log(JSON.stringify(result));
process.exit(0);
