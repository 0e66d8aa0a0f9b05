// SPDX-License-Identifier: Apache-2.0

// Command demo starts the lab and shows what the API server lets each caller on the
// tailnet do. All results come from the API server.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/recorder"
)

// callers are the devices of the demo, with the answers that the policy file and the
// bindings in the project's examples lead to.
var callers = []struct {
	lab.CallerSpec
	kind string
	want answers
}{
	{lab.CallerSpec{Name: "alice", Login: "alice@example.com"}, "user, granted system:masters",
		answers{user: "alice@example.com", groups: "system:masters", list: yes, remove: yes, secrets: yes}},
	{lab.CallerSpec{Name: "bob", Login: "bob@example.com"}, "user, granted tailnet-readers",
		answers{user: "bob@example.com", groups: "tailnet-readers", list: yes, remove: no, secrets: no}},
	{lab.CallerSpec{Name: "carol", Login: "carol@example.com"}, "user, no grant, bound by name",
		answers{user: "carol@example.com", groups: none, list: yes, remove: no, secrets: no}},
	{lab.CallerSpec{Name: "ci", Tags: []string{"tag:k8s-readers"}}, "tagged device, no grant",
		answers{user: "ci." + lab.Domain, groups: "tag:k8s-readers", list: yes, remove: no, secrets: no}},
	{lab.CallerSpec{Name: "dave", Login: "dave@example.com"}, "user, nothing",
		answers{user: "dave@example.com", groups: none, list: no, remove: no, secrets: no}},
}

func main() {
	if becameReplica() {
		return
	}
	once := flag.Bool("once", false, "stop after the table; exit with status 1 if a cell contradicts the policy")
	count := flag.Int("replicas", 1, "2 for two replicas behind one name, one of which is killed")
	nothing := flag.Bool("nothing", false, "do nothing, to see whether the program can be started")
	dir := flag.String("dir", "", "folder for logs and kubeconfig files (default: .run/demo in the lab's folder)")
	flag.Parse()
	if *nothing {
		return
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := choose(ctx, *count, *dir, *once); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// choose runs the demo of one or of two replicas.
func choose(ctx context.Context, count int, dir string, once bool) error {
	switch {
	case count != 1 && count != 2:
		return fmt.Errorf("there are demos with 1 and with 2 replicas, and not with %d", count)
	case count == 2:
		return startReplicas(ctx, dir, once)
	}
	dir, err := folder(dir)
	if err != nil {
		return err
	}
	return run(ctx, dir, once)
}

// folder returns an empty folder for the demo's files: dir, if that is given.
func folder(dir string) (string, error) {
	root, err := lab.Root()
	if err != nil {
		return "", err
	}
	if dir == "" {
		dir = filepath.Join(root, "lab", ".run", "demo")
	}
	// Remove the files of an earlier run: its addresses and keys are no longer valid.
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o700)
}

func run(ctx context.Context, dir string, once bool) (err error) {
	root, err := lab.Root()
	if err != nil {
		return err
	}

	fmt.Printf("Starting a tailnet and a cluster (logs: %s)\n", dir)
	cfg := lab.Config{
		Dir:       dir,
		Examples:  filepath.Join(root, "examples"),
		Caddyfile: caddyfile,
		Policy:    recorder.Admit,
		Progress:  os.Stdout,
	}
	if err := node.Unavailable(); err != nil {
		fmt.Printf("Pods are processes of this machine: %v\n", err)
	} else {
		cfg.RealNode = true
	}
	for _, c := range callers {
		cfg.Callers = append(cfg.Callers, c.CallerSpec)
	}
	l, err := lab.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Stop()) }()

	wrong, err := printTable(ctx, l)
	if err != nil {
		return err
	}
	if wrong > 0 && once {
		return fmt.Errorf("%d cells contradict the policy file and the bindings", wrong)
	}
	if err := showRecording(ctx, l); err != nil {
		return err
	}
	if err := showActingAs(ctx, l); err != nil {
		return err
	}
	if err := showChoosing(ctx, l); err != nil {
		return err
	}
	if err := printPages(ctx, l); err != nil {
		return err
	}
	if once {
		return nil
	}
	printUsage(l)
	<-ctx.Done()
	fmt.Println("\nStopping.")
	return nil
}

// caddyfile is a user's Caddyfile, with the lab's addresses.
func caddyfile(l *lab.Lab) string {
	return l.Globals(l.ProxyKey()) + `
https://k8s.tailnet.example {
	bind tailscale/k8s
	tls internal
	tailscale_kubernetes {
		kubeconfig ` + l.Kubeconfig() + `
		client_impersonation authorize
		audit
		whoami
	}
}
http://k8s.tailnet.example {
	bind tailscale/k8s
	tailscale_kubernetes {
		kubeconfig ` + l.Kubeconfig() + `
		optional_groups system:masters
		audit
		whoami
	}
}
`
}

// printUsage prints how to use kubectl as each caller.
func printUsage(l *lab.Lab) {
	kubectl, err := components.Path("kubectl")
	if err != nil {
		kubectl = "kubectl"
	}
	fmt.Printf("\nThe tailnet and the cluster run until you press Ctrl-C. In another shell:\n\n\talias kubectl=%s\n\n", kubectl)
	for _, c := range callers {
		fmt.Printf("\texport KUBECONFIG=%s   # %s\n", l.Callers[c.Name].Kubeconfig, c.kind)
	}
	fmt.Printf(`
	kubectl auth whoami
	kubectl get pods
	kubectl exec -it %s -- sh     # %s
	kubectl logs -f %s

The Caddyfile that serves them: %s
`, lab.Pod, place(l), lab.Pod, filepath.Join(l.Dir, "Caddyfile"))
}

// place says where a shell of the pod is.
func place(l *lab.Lab) string {
	if l.Cluster.Node() == nil {
		return "a shell on this machine, in an empty folder: pods are not real here"
	}
	return "a shell in the pod's container"
}
