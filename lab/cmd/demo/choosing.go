// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// showChoosing shows what alice may do with her usual context and with the one for her
// optional group, on the site on which nobody is cluster-admin unasked, and the audit log's
// entries about both.
func showChoosing(ctx context.Context, l *lab.Lab) error {
	fmt.Println("\nOn a site with optional_groups system:masters, alice is not cluster-admin until she asks:")
	alice := l.Callers["alice"]
	kubeconfig := filepath.Join(l.Dir, "alice.kubeconfig.choosing")
	// The file has a context for the other site as well.
	usualContext, err := download(ctx, alice, "http://k8s.tailnet.example/whoami?kubeconfig", kubeconfig)
	if err != nil {
		return fmt.Errorf("the kubeconfig of the whoami page: %w", err)
	}
	for _, try := range []struct {
		context string
		allowed bool
	}{{usualContext, false}, {usualContext + "-system-masters", true}} {
		args := []string{"get", "secrets", "--all-namespaces", "--context", try.context}
		cmd, err := lab.Kubectl(ctx, kubeconfig, args...)
		if err != nil {
			return err
		}
		out, err := cmd.CombinedOutput()
		said := strings.TrimSpace(string(out))
		fmt.Printf("\n\talice$ kubectl %s\n\t%s\n", strings.Join(args, " "), strings.ReplaceAll(said, "\n", "\n\t"))
		if (err == nil) != try.allowed {
			return fmt.Errorf("alice with the context %s: allowed: %t; want the opposite (%s)", try.context, err == nil, said)
		}
	}
	events, err := auditEvents(l.Cluster.AuditLog())
	if err != nil {
		return err
	}
	fmt.Println("\nThe API server's audit log about both:")
	var usual, asked *auditEvent
	for i, e := range events {
		switch extra := e.ImpersonatedUser.Extra; {
		case !strings.HasPrefix(e.RequestURI, "/api/v1/secrets"):
		case extra[impersonate.ExtraChosenGroups] != nil:
			asked = &events[i]
		case extra[impersonate.ExtraHeldBackGroups] != nil:
			usual = &events[i]
		}
	}
	if usual == nil || asked == nil {
		return fmt.Errorf("the audit log %s lacks an entry about them", l.Cluster.AuditLog())
	}
	return errors.Join(show(usual.AuditID, "impersonatedUser", usual.ImpersonatedUser), show(asked.AuditID, "impersonatedUser", asked.ImpersonatedUser))
}

// download writes the kubeconfig at url to file, so that kubectl on this machine can use it
// as the caller. It returns the current context.
func download(ctx context.Context, c *lab.Caller, url, file string) (current string, err error) {
	rc, err := c.REST()
	if err != nil {
		return "", err
	}
	client, err := rest.HTTPClientFor(rc)
	if err != nil {
		return "", err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	config, err := clientcmd.Load(text)
	if err != nil {
		return "", err
	}
	// This machine is not on the tailnet: use the caller's SOCKS proxy.
	device, err := clientcmd.LoadFromFile(c.Kubeconfig)
	if err != nil {
		return "", err
	}
	for _, cluster := range config.Clusters {
		cluster.ProxyURL = device.Clusters["lab"].ProxyURL
	}
	return config.CurrentContext, clientcmd.WriteToFile(*config, file)
}
