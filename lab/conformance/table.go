// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Table holds the results of attacks on one or more proxies, or on one proxy reached
// in several ways.
type Table struct {
	out     io.Writer
	results []Result
}

// NewTable returns a table that prints to out.
func NewTable(out io.Writer) *Table { return &Table{out: out} }

// Attack attacks a proxy and adds the results to the table. It prints the number of
// attacks and the first failure, and returns the number of failures.
func (t *Table) Attack(ctx context.Context, p Proxy, options Options) (failures int, err error) {
	began := time.Now()
	results, err := Run(ctx, p, options)
	if err != nil {
		return 0, err
	}
	tried := 0
	var first *Failure
	for _, r := range results {
		tried += r.Tried
		failures += len(r.Failures)
		if first == nil && len(r.Failures) > 0 {
			first = &r.Failures[0]
		}
		sum := &t.results[resultOf(&t.results, r.Pitfall, protocol(r.Protocol))]
		sum.Tried += r.Tried
		sum.Passed += r.Passed
		sum.Ended += r.Ended
		sum.Failures = append(sum.Failures, r.Failures...)
	}
	fmt.Fprintf(t.out, "%s: %d requests in %.1f s, %d failed\n", p.Name, tried, time.Since(began).Seconds(), failures)
	if first != nil {
		fmt.Fprintf(t.out, "  first failure: attack %d over %s (pitfall %s): %s\n  to repeat: -attack %d, or %s\n", first.Attack, first.Protocol, first.Pitfall, first.Reason, first.Attack, first.Request)
	}
	return failures, nil
}

// Print prints the table by pitfall and protocol, and the tests that cover what no
// client request can show.
func (t *Table) Print() {
	fmt.Fprintf(t.out, "\n%-51s %-9s %7s %7s %7s %7s\n", "pitfall", "protocol", "tried", "exact", "nothing", "failed")
	for _, p := range pitfalls {
		for _, proto := range []protocol{http1, http2, http3} {
			i := slices.IndexFunc(t.results, func(r Result) bool { return r.Pitfall == p.id && r.Protocol == string(proto) })
			if i < 0 {
				continue
			}
			r := t.results[i]
			fmt.Fprintf(t.out, "%-51s %-9s %7d %7d %7d %7d\n", p.id+" "+p.title, proto, r.Tried, r.Passed, r.Ended, len(r.Failures))
		}
	}
	fmt.Fprintln(t.out, "\nCovered by tests, or in more detail there:")
	for _, p := range pitfalls {
		if len(p.tests) > 0 {
			fmt.Fprintf(t.out, "%s %s\n    %s\n", p.id, p.title, strings.Join(p.tests, " "))
		}
	}
}
