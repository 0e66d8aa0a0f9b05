// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/ipn"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// A tagged device that changes its hostname is another Kubernetes user, without an
// administrator, unless users of devices are their IDs.
func TestNames_RenamedDeviceKeepsItsID(t *testing.T) {
	web, err := theLab.Join(t.Context(), lab.CallerSpec{Name: "web", Tags: []string{"tag:k8s-readers"}})
	if err != nil {
		t.Fatal(err)
	}
	byID := web.Kubeconfig + "." + portDeviceUsers
	if err := web.WriteKubeconfig(byID, "http://"+lab.ProxyName+":"+portDeviceUsers); err != nil {
		t.Fatal(err)
	}
	_, id, _ := device(t, "web")
	check := func() {
		t.Helper()
		if got := whoAmIAt(t, byID); got.Username != "device:"+id || !strings.Contains(strings.Join(got.Groups, " "), "tag:k8s-readers") {
			t.Errorf("with tagged_user id, the API server sees %+v; want the user device:%s", got, id)
		}
	}
	if got := whoAmIAt(t, web.Kubeconfig).Username; got != "web."+lab.Domain {
		t.Fatalf("the device is %s", got)
	}
	check()
	client, err := web.Server.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.EditPrefs(t.Context(), &ipn.MaskedPrefs{HostnameSet: true, Prefs: ipn.Prefs{Hostname: "prod-deployer"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the device has taken another name", func() error {
		if got := whoAmIAt(t, web.Kubeconfig).Username; got != "prod-deployer."+lab.Domain {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	check()
	if got := whoAmIAt(t, theLab.Callers["bob"].Kubeconfig).Username; got != "bob@example.com" {
		t.Errorf("bob is %s", got)
	}
}

// A grant with a misspelt key passes the control server. The proxy says what is wrong with
// it, and does not give the device its tags in place of what the grant was to give.
func TestNames_MisspeltGrantGivesNothing(t *testing.T) {
	log := tail(t, theLab.Log("caddy"))
	grantRuleTo(t, "tag:k8s-readers", map[string]any{"impersonate": map[string]any{"group": []string{"tailnet-readers"}}})
	const problem = `unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`
	var facts whoami.Facts
	eventually(t, "the grant has arrived", func() error {
		facts = whoami.Facts{}
		resp := send(t, "ci", portDeviceUsers, get("/whoami", "Accept: application/json", "Host: k8s.tailnet.example:"+portDeviceUsers))
		if err := json.Unmarshal([]byte(resp.body), &facts); err != nil {
			t.Fatalf("%s: %v\n%s", resp.Status, err, resp.body)
		}
		if len(facts.Grants) == 0 {
			return errors.New("no grant")
		}
		return nil
	})
	if diff := cmp.Diff([]string{problem}, facts.Grants[0].Problems); diff != "" || !facts.TagsLeftOut || len(facts.Groups) > 0 {
		t.Errorf("whoami says %+v", facts)
	}
	ci := theLab.Callers["ci"].Kubeconfig
	if diff := cmp.Diff([]string{"system:authenticated"}, whoAmIAt(t, ci).Groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
	eventually(t, "the log says it", func() error {
		for _, line := range log.lines(t) {
			if strings.Contains(line, "grants have unknown or repeated keys") && strings.Contains(line, "impersonate.groups") {
				return nil
			}
		}
		return errors.New("no such line")
	})
}
