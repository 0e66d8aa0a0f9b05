// SPDX-License-Identifier: Apache-2.0

package replicas

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// The names of the site. MagicDNS answers with one IPv4 and one IPv6 address of a name, so
// that family has the one of the first replica and the other of the second. The hosts file,
// as any other DNS, answers with all that all has.
const (
	family = "k8s." + lab.Domain
	all    = "k8s.replicas.example"
)

// A name that has addresses of both replicas serves while one of them is killed, hangs or
// restarts.
func TestDNS_ServesWithoutOneReplica(t *testing.T) {
	inNamespace(t, serveWithoutOne)
}

func serveWithoutOne(t *testing.T) {
	w := startCluster(t)
	tn, err := w.Headscale(t.Context(), "alice@example.com")
	w.check(err)
	w.startReplicas(tn, family+", https://"+all, func(node string) string { return "tailscale/" + node })
	machine := w.joinMachine(tn)
	first, _, err := machine.Addresses(t.Context(), w.Replicas[0].Name)
	w.check(err)
	second, second6, err := machine.Addresses(t.Context(), w.Replicas[1].Name)
	w.check(err)
	if err := w.Lab.Headscale.SetRecords(
		tailcfg.DNSRecord{Name: family, Type: "A", Value: first.String()},
		tailcfg.DNSRecord{Name: family, Type: "AAAA", Value: second6.String()},
	); err != nil {
		t.Fatal(err)
	}
	hosts, err := os.OpenFile("/etc/hosts", os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(hosts, "\n%v %s\n%v %s\n", first, all, second, all); err != nil {
		t.Fatal(err)
	}
	_ = hosts.Close()

	configs := map[string]string{family: w.kubeconfig(family), all: w.kubeconfig(all)}
	for name, kubeconfig := range configs {
		w.until(name+" answers", func() error { _, err := w.kubectl(kubeconfig, "get", "namespace", "default"); return err })
	}

	for _, fault := range []struct {
		name        string
		begin, undo func()
	}{
		{"restarts", func() { w.check(w.Replicas[0].Terminate()) }, func() { w.check(w.Replicas[0].Start()) }},
		{"hangs", func() { w.signal(0, syscall.SIGSTOP) }, func() { w.signal(0, syscall.SIGCONT) }},
		{"is killed", func() { w.Replicas[0].Kill() }, func() { w.check(w.Replicas[0].Start()) }},
	} {
		loads := make(map[string]*load)
		for name, kubeconfig := range configs {
			loads[name] = w.get(kubeconfig)
		}
		streams := w.openStreams("before a replica "+fault.name, configs[family])
		began := time.Now()
		fault.begin()
		down := time.Now()
		for _, s := range w.openStreams(fmt.Sprintf("%s, while a replica %s", family, fault.name), configs[family]) {
			s.kill()
		}
		if fault.name == "is killed" {
			w.tryOthers("without the first replica", configs)
		}
		for name, l := range loads {
			w.until("kubectl has used "+name+" several times", func() error {
				if n := len(l.since(down)); n < 3 {
					return fmt.Errorf("%d times", n)
				}
				return nil
			})
		}
		w.logEnds(streams, "a replica "+fault.name, began)
		fault.undo()
		for name, l := range loads {
			made, lost, later, longest, last := l.outcome(began)
			t.Logf("%s, while a replica %s: %d requests made, %d lost, longest wait %.1f s", name, fault.name, made, lost, longest.Seconds())
			// What was on its way to a replica that is killed or hangs can be lost.
			if later > 0 || fault.name == "restarts" && lost > 0 {
				t.Errorf("%s, while a replica %s: %d requests failed, %d of them begun later; the last: %v", name, fault.name, lost, later, last)
			}
		}
		// The next fault meets both.
		w.untilServed(0, first.String())
	}
	// Go tries IPv4 first, other clients IPv6.
	w.Replicas[1].Kill()
	w.tryOthers("without the second replica", map[string]string{family: configs[family]})
}

// signal sends a signal to replica i.
func (w *world) signal(i int, sig syscall.Signal) {
	w.Helper()
	if err := w.Replicas[i].Signal(sig); err != nil {
		w.Fatal(err)
	}
}

// untilServed waits until replica i takes connections at its address.
func (w *world) untilServed(i int, address string) {
	w.Helper()
	w.until(w.Replicas[i].Name+" is back", func() error {
		ctx, cancel := context.WithTimeout(w.Context(), 5*time.Second)
		defer cancel()
		out, err := exec.CommandContext(ctx, "bash", "-c", ": </dev/tcp/"+address+"/443").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// python reads a namespace with Kubernetes' client, and waits for a connection as long as
// its third argument says.
const python = `
import sys
from kubernetes import client
c = client.Configuration()
c.host, c.ssl_ca_cert = sys.argv[1], sys.argv[2]
timeout = float(sys.argv[3]) or None
print(client.CoreV1Api(client.ApiClient(c)).read_namespace("default", _request_timeout=(timeout, 60)).metadata.name)
`

// javascript reads a namespace with Kubernetes' client.
const javascript = `
import { CoreV1Api, KubeConfig } from '@kubernetes/client-node';
const config = new KubeConfig();
config.loadFromFile(process.argv[1]);
console.log((await config.makeApiClient(CoreV1Api).readNamespace({ name: 'default' })).metadata.name);
`

// tryOthers logs how long other clients take to get an answer, all at the same time.
func (w *world) tryOthers(when string, configs map[string]string) {
	w.Helper()
	root, err := lab.Root()
	if err != nil {
		w.Fatal(err)
	}
	const interpreter = "/usr/bin/python3" // Debian's, which has Debian's packages
	withPython := exec.Command(interpreter, "-c", "import kubernetes").Run() == nil
	if !withPython {
		w.Log("Kubernetes' Python client is not tried: it is not installed; run apt-get install python3-kubernetes")
	}
	node := filepath.Join(root, "lab", "tools", "client-node")
	_, err = os.Stat(filepath.Join(node, "node_modules"))
	withNode := err == nil
	if !withNode {
		w.Log("Kubernetes' JavaScript client is not tried: it is not installed; run `make client-node`")
	}
	ctx, cancel := context.WithTimeout(w.Context(), 5*time.Minute)
	defer cancel()
	var trying sync.WaitGroup
	defer trying.Wait()
	for name, kubeconfig := range configs {
		try := func(what string, cmd *exec.Cmd) {
			trying.Go(func() { w.try(fmt.Sprintf("%s, %s, %s", name, when, what), cmd) })
		}
		kubectl, err := lab.Kubectl(ctx, kubeconfig, "exec", lab.Pod, "--", "echo", "done")
		if err != nil {
			w.Fatal(err)
		}
		try("kubectl exec", kubectl)
		if withPython {
			try("Python with a timeout of 5 s", exec.CommandContext(ctx, interpreter, "-c", python, "https://"+name, w.Authority(), "5"))
			try("Python", exec.CommandContext(ctx, interpreter, "-c", python, "https://"+name, w.Authority(), "0"))
		}
		if withNode {
			cmd := exec.CommandContext(ctx, "node", "--input-type=module", "-e", javascript, kubeconfig)
			cmd.Dir = node
			try("JavaScript", cmd)
		}
		try("curl", exec.CommandContext(ctx, "curl", "--silent", "--show-error", "--fail", "--cacert", w.Authority(), "https://"+name+"/api/v1/namespaces/default"))
	}
}

// try runs a program, and logs how long it takes. Whether it succeeds is what the test finds
// out.
func (w *world) try(what string, cmd *exec.Cmd) {
	began := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.Logf("%s: fails after %.1f s: %v: %s", what, time.Since(began).Seconds(), err, lastLine(string(out)))
		return
	}
	w.Logf("%s: answered after %.1f s", what, time.Since(began).Seconds())
}
