// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// onlyPort returns the lab's policy file, in which devices with the tag may open
// connections to this port of the proxy alone.
func onlyPort(t *testing.T, tag, port string) []byte {
	t.Helper()
	var policy map[string]any
	if err := json.Unmarshal(theLab.Policy, &policy); err != nil {
		t.Fatal(err)
	}
	for _, grant := range policy["grants"].([]any) {
		grant := grant.(map[string]any)
		if grant["ip"] != nil {
			grant["src"] = slices.DeleteFunc(grant["src"].([]any), func(src any) bool { return src == tag })
		}
	}
	policy["grants"] = append(policy["grants"].([]any), map[string]any{
		"src": []string{tag}, "dst": []string{lab.ProxyTag}, "ip": []string{port},
	})
	changed, err := json.Marshal(policy)
	if err != nil {
		t.Fatal(err)
	}
	return changed
}

// A tagged device that has no grant for the cluster loses the proxy's port in the policy
// file, and keeps another. The tailnet itself leaves its open connections alone.
func TestRevocation_LostPortEndsOpenConnections(t *testing.T) {
	site := "https://" + lab.ProxyName + "." + lab.Domain
	pods := site + "/api/v1/namespaces/default/pods"
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(proto, func(t *testing.T) {
			get := func(client *http.Client, url string) (int, string, error) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
				if err != nil {
					return 0, "", err
				}
				resp, err := client.Do(req)
				if err != nil {
					return 0, "", err
				}
				defer resp.Body.Close()
				body, err := io.ReadAll(resp.Body)
				return resp.StatusCode, string(body), err
			}
			// Connections of their own: a watch that ends takes its connection away.
			client, watching := clientOf(t, theLab.Callers["ci"], proto), clientOf(t, theLab.Callers["ci"], proto)
			if status, body, err := get(client, pods); err != nil || status != http.StatusOK {
				t.Fatalf("before: %d, %v: %s", status, err, body)
			}
			resp, err := watching.Get(pods + "?watch=true")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			watch := bufio.NewReader(resp.Body)
			if line, err := watch.ReadString('\n'); err != nil || !strings.Contains(line, "ADDED") {
				t.Fatalf("the watch begins with %q, %v; want ADDED", line, err)
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_, _ = io.Copy(io.Discard, watch)
			}()

			if err := theLab.Headscale.SetPolicy(t.Context(), onlyPort(t, "tag:k8s-readers", "tcp:9")); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := theLab.Headscale.SetPolicy(context.Background(), theLab.Policy); err != nil {
					t.Error(err)
				}
				eventually(t, "ci has the port again", func() error {
					status, body, err := get(clientOf(t, theLab.Callers["ci"], proto), pods)
					if err == nil && status != http.StatusOK {
						err = fmt.Errorf("%d: %s", status, body)
					}
					return err
				})
			}()
			changed := time.Now()
			eventually(t, "new requests on the open connection are refused", func() error {
				status, body, err := get(client, pods)
				if err != nil {
					t.Fatalf("the connection was not used again: %v", err)
				}
				if status != http.StatusForbidden || !strings.Contains(body, "may no longer connect to this server") {
					return errors.New(body[:min(len(body), 200)])
				}
				return nil
			})
			t.Logf("requests are refused after %.1f s", time.Since(changed).Seconds())
			select {
			case <-ended:
				t.Logf("the watch has ended after %.1f s", time.Since(changed).Seconds())
			case <-time.After(time.Until(changed.Add(revokedWithin))):
				t.Errorf("the watch is still open %v after the port was withdrawn", revokedWithin)
			}
			// As a control, of the tailnet.
			if status, body, err := get(clientOf(t, theLab.Callers["ci"], proto), pods); err == nil {
				t.Errorf("a new connection was opened: %d %s", status, body)
			}
		})
	}
}
