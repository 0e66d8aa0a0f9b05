// SPDX-License-Identifier: Apache-2.0

package kubetest

import (
	"fmt"
	"slices"
	"strings"
)

// Set chooses tests by their names.
type Set struct {
	// Name is what the table calls the set.
	Name string
	// Focus are regular expressions, of which a test's name has to match one, and Skip
	// are those of which it must match none.
	Focus, Skip []string
}

// streaming are the tests of kubectl's streams that are not conformance tests.
const streaming = `\[sig-cli\] (Kubectl client (Simple pod|Kubectl copy) |Kubectl (exec|logs|Port forwarding) |kubectl debug )`

// outOfReach are tests that need more than one node, or that may leave the node unusable for
// those that come after them.
const outOfReach = `\[Disruptive\]`

// The parts that can be run: all, and the one that continuous integration has time for.
const (
	PartAll = "all"
	PartCI  = "ci"
)

// Sets returns the sets of a part.
func Sets(part string) ([]Set, error) {
	conformance := func(sig string, further ...string) Set {
		return Set{
			Name:  "sig-" + sig,
			Focus: append([]string{`\[sig-` + sig + `\].*\[Conformance\]`}, further...),
			Skip:  []string{outOfReach},
		}
	}
	switch part {
	case PartAll:
		return []Set{
			conformance("api-machinery"),
			conformance("auth"),
			conformance("cli", streaming),
			conformance("apps"),
			conformance("node", `\[sig-node\] Ephemeral Containers`, `\[sig-node\] Kubelet.*log\?stream`),
		}, nil
	case PartCI:
		// What an API server streams, what it checks of a caller, and what long answers
		// depend on: the tests that a proxy is most likely to break.
		return []Set{
			{
				Name:  "streams",
				Focus: []string{streaming, `\[sig-node\] Pods .* over websockets`, `\[sig-node\] Ephemeral Containers`},
				Skip:  []string{outOfReach, `\[Slow\]`, `1000 times`, `in-cluster config`},
			},
			{
				Name:  "identity",
				Focus: []string{`\[sig-auth\] (SubjectReview|SelfSubjectReview|Certificates API .*\[Conformance\]|ServiceAccounts .*(lifecycle|token|mount an API token))`},
				Skip:  []string{outOfReach, `\[Slow\]`},
			},
			{
				Name:  "watches and tables",
				Focus: []string{`\[sig-api-machinery\] (Watchers|Servers with support for (Table transformation|API chunking)|Discovery|server version|FieldValidation) .*\[Conformance\]`},
				Skip:  []string{outOfReach, `\[Slow\]`},
			},
		}, nil
	}
	return nil, fmt.Errorf("unknown part %q: use %s or %s", part, PartAll, PartCI)
}

// Named returns the sets with the given names, separated by commas. Without names, it returns
// all of them.
func Named(sets []Set, names string) ([]Set, error) {
	if names == "" {
		return sets, nil
	}
	var chosen []Set
	for name := range strings.SplitSeq(names, ",") {
		i := slices.IndexFunc(sets, func(s Set) bool { return s.Name == name })
		if i < 0 {
			var all []string
			for _, s := range sets {
				all = append(all, s.Name)
			}
			return nil, fmt.Errorf("no set %q: use one of %q", name, all)
		}
		chosen = append(chosen, sets[i])
	}
	return chosen, nil
}
