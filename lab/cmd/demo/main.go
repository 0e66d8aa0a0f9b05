// SPDX-License-Identifier: Apache-2.0

// Command demo brings up the lab and shows what the API server lets each caller
// on the tailnet do. Everything that it prints was answered by the API server.
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
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/recorder"
)

// callers are the devices of the demo, with what the policy file and the
// bindings in the project's examples say about them.
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
	once := flag.Bool("once", false, "stop after the table; exit with 1 if a cell is not what the policy says")
	dir := flag.String("dir", "", "folder for logs and kubeconfig files (default: .run/demo in the lab's folder)")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *dir, *once); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dir string, once bool) (err error) {
	root, err := lab.Root()
	if err != nil {
		return err
	}
	if dir == "" {
		dir = filepath.Join(root, "lab", ".run", "demo")
	}
	// What an earlier run left is of no use: its addresses and keys are gone.
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}

	fmt.Printf("Bringing up a tailnet and a cluster (logs: %s)\n", dir)
	cfg := lab.Config{
		Dir:       dir,
		Examples:  filepath.Join(root, "examples"),
		Caddyfile: caddyfile,
		Policy:    recorder.Admit,
		Progress:  os.Stdout,
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
		return fmt.Errorf("%d cells are not what the policy file and the bindings say", wrong)
	}
	if err := showRecording(ctx, l); err != nil {
		return err
	}
	if err := showActingAs(ctx, l); err != nil {
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

// caddyfile is what a user would write, for the lab's addresses.
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
`
}

// printUsage says how to be each of the callers.
func printUsage(l *lab.Lab) {
	kubectl, err := components.Path("kubectl")
	if err != nil {
		kubectl = "kubectl"
	}
	fmt.Printf("\nThe tailnet and the cluster stay up until you press Ctrl-C. In another shell:\n\n\talias kubectl=%s\n\n", kubectl)
	for _, c := range callers {
		fmt.Printf("\texport KUBECONFIG=%s   # %s\n", l.Callers[c.Name].Kubeconfig, c.kind)
	}
	fmt.Printf(`
	kubectl auth whoami
	kubectl get pods
	kubectl exec -it %s -- sh     # a shell on this machine, in an empty folder: pods are not real here
	kubectl logs -f %s

The Caddyfile that serves them: %s
`, lab.Pod, lab.Pod, filepath.Join(l.Dir, "Caddyfile"))
}
