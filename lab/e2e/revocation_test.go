// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"testing"
	"time"
)

// revokedWithin is how long a stream may stay open after its caller lost access: the
// sites have the default recheck_interval of 5 s.
const revokedWithin = 5*time.Second + 2*time.Second

// Dave is granted system:masters, opens an exec, a port-forward and a watch, and
// loses the grant. With one of the two protocols, a config reload comes in between.
func TestRevocation_WithdrawnGrantEndsOpenStreams(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		withdraw := grantTo(t, "dave@example.com", masters())
		eventually(t, "dave may list secrets", func() error {
			_, stderr, err := tryKubectl(t, "dave", "get", "secrets")
			if err != nil {
				return fmt.Errorf("%w: %s", err, stderr)
			}
			return nil
		})
		his := startStreamsAs(t, "dave", "dave", p)
		others := startStreams(t, p)
		if p.name == "SPDY" {
			if err := theLab.Caddy.Load(withVersion("other")); err != nil {
				t.Fatal(err)
			}
			defer firstConfig(t)
			his.flow(t)
		}

		withdraw()
		withdrawn := time.Now()
		for what, s := range map[string]*session{"exec": his.exec, "port-forward": his.forward, "watch": his.watch} {
			select {
			case <-s.ended:
			case <-time.After(time.Until(withdrawn.Add(revokedWithin))):
				t.Errorf("the %s is still open %v after the grant was withdrawn", what, revokedWithin)
			}
		}
		t.Logf("all streams ended within %.1f s", time.Since(withdrawn).Seconds())
		his.exec.failedWith(t, "access was withdrawn: dave@example.com is no longer in group "+masters())
		others.flow(t)
	})
}

// A new config ends open streams that it would refuse.
func TestRevocation_NewConfigEndsRefusedStreams(t *testing.T) {
	const object = "judged-anew"
	kubectl(t, "alice", "create", "configmap", object)
	t.Cleanup(func() { kubectl(t, "alice", "delete", "configmap", object, "--ignore-not-found") })
	watch := func(caller string) *session {
		s := startKubectl(t, theLab.Callers[caller].Kubeconfig, nil, "get", "configmaps", "--watch", "--output-watch-events", "--no-headers", "--field-selector", "metadata.name="+object)
		s.want(t, "ADDED")
		return s
	}
	bobs, carols := watch("bob"), watch("carol")
	stricter := replaceOnce(sites(theLab), "\ttls internal\n\ttailscale_kubernetes {\n", "\ttls internal\n\ttailscale_kubernetes {\n\t\tdeny_groups tailnet-readers\n")
	if err := theLab.Caddy.Load(stricter); err != nil {
		t.Fatal(err)
	}
	defer firstConfig(t)
	select {
	case <-bobs.ended:
	case <-time.After(revokedWithin):
		t.Errorf("bob's watch is still open %v after a config denied his group", revokedWithin)
	}
	kubectl(t, "alice", "label", "configmap", object, "seen=yes")
	carols.want(t, "MODIFIED")
}
