// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"

	"k8s.io/client-go/rest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// printPages prints what the whoami page says to two of the callers, and how each of
// them uses kubectl.
func printPages(ctx context.Context, l *lab.Lab) error {
	kubectl, err := components.Path("kubectl")
	if err != nil {
		return err
	}
	fmt.Println("\nWhat https://k8s.tailnet.example/whoami says to two of them (a browser shows it as a page):")
	for _, name := range []string{"bob", "ci"} {
		c := l.Callers[name]
		facts, err := whoIs(ctx, c)
		if err != nil {
			return fmt.Errorf("the whoami page as %s: %w", name, err)
		}
		fmt.Println()
		if err := whoami.WriteText(os.Stdout, facts); err != nil {
			return err
		}
		fmt.Printf("  KUBECONFIG=%s %s get pods\n", c.Kubeconfig, kubectl)
	}
	return nil
}

// whoIs returns what the whoami page says to a caller.
func whoIs(ctx context.Context, c *lab.Caller) (*whoami.Facts, error) {
	config, err := c.REST()
	if err != nil {
		return nil, err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, config.Host+"/whoami", nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/json")
	resp, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	facts := new(whoami.Facts)
	if err := json.NewDecoder(resp.Body).Decode(facts); err != nil {
		return nil, fmt.Errorf("%s: %w", resp.Status, err)
	}
	return facts, nil
}
