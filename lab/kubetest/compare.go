// SPDX-License-Identifier: Apache-2.0

package kubetest

import (
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// Known is a test that fails in the lab without the plugin too.
type Known struct {
	// Test is its name.
	Test string `json:"test"`
	// Reason says why it fails.
	Reason string `json:"reason"`
}

//go:embed known.yaml
var knownFile []byte

// KnownFailures returns the reasons of known.yaml by the names of tests.
func KnownFailures() (map[string]string, error) { return parseKnown(knownFile) }

func parseKnown(file []byte) (map[string]string, error) {
	var list []Known
	if err := yaml.UnmarshalStrict(file, &list); err != nil {
		return nil, fmt.Errorf("known.yaml: %w", err)
	}
	known := make(map[string]string, len(list))
	for _, k := range list {
		switch {
		case k.Test == "" || k.Reason == "":
			return nil, fmt.Errorf("known.yaml: an entry needs a test and a reason: %+v", k)
		case known[k.Test] != "":
			return nil, fmt.Errorf("known.yaml: %q is there twice", k.Test)
		}
		known[k.Test] = k.Reason
	}
	return known, nil
}

// Pair is the results of one test.
type Pair struct {
	Test            string
	Direct, Through Result
	// Reason says why the test is known to fail directly.
	Reason string
}

// Comparison is the result of two runs of a set of tests.
type Comparison struct {
	Set string
	// Both pass directly and through the plugin. Skip says the same of tests that skip
	// themselves.
	Both, Skip []Pair
	// Lost pass directly and not through the plugin, or ran only one way.
	Lost []Pair
	// Known fail directly, as known.yaml says. What they do through the plugin says
	// nothing about it.
	Known []Pair
	// Unknown fail directly, and known.yaml does not say why.
	Unknown []Pair
	// Stale pass directly although known.yaml says that they fail.
	Stale []Pair
	// Again are those of Both that passed both ways only when they were run again.
	Again []Pair

	DirectSeconds, ThroughSeconds float64
}

// Compare compares a run of a set that called the API server directly with one that
// called it through the plugin.
func Compare(set string, direct, through Report, known map[string]string) Comparison {
	c := Comparison{Set: set, DirectSeconds: direct.Seconds, ThroughSeconds: through.Seconds}
	names := slices.Collect(maps.Keys(direct.Results))
	for name := range through.Results {
		if _, ok := direct.Results[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		p := Pair{name, of(direct, name), of(through, name), known[name]}
		if p.Direct.Outcome == Passed && p.Reason != "" {
			c.Stale = append(c.Stale, p)
		}
		switch {
		case p.Direct.Outcome == Failed && p.Reason == "":
			c.Unknown = append(c.Unknown, p)
		case p.Direct.Outcome == Failed:
			c.Known = append(c.Known, p)
		case p.Direct.Outcome != p.Through.Outcome:
			c.Lost = append(c.Lost, p)
		case p.Direct.Outcome == Skipped:
			c.Skip = append(c.Skip, p)
		default:
			c.Both = append(c.Both, p)
		}
	}
	return c
}

// RunAgain returns a set with the tests for which [Comparison.Err] returns an error, or nil if
// there are none. Tests have limits of time, which a busy machine exceeds.
func (c Comparison) RunAgain() *Set {
	again := &Set{Name: c.Set + " again"}
	for _, p := range slices.Concat(c.Lost, c.Unknown) {
		again.Focus = append(again.Focus, regexp.QuoteMeta(p.Test)+"$")
	}
	if len(again.Focus) == 0 {
		return nil
	}
	return again
}

// Merge takes over the results of tests that were run again and pass both ways now. What fails
// again, in whichever way, keeps its first result.
func (c *Comparison) Merge(again Comparison) {
	passes := make(map[string]bool)
	for _, p := range again.Both {
		passes[p.Test] = true
	}
	for _, from := range []*[]Pair{&c.Lost, &c.Unknown} {
		*from = slices.DeleteFunc(*from, func(p Pair) bool {
			if passes[p.Test] {
				c.Both, c.Again = append(c.Both, p), append(c.Again, p)
			}
			return passes[p.Test]
		})
	}
}

// of returns the result of a test in a report.
func of(r Report, name string) Result {
	result, ok := r.Results[name]
	if !ok {
		return Result{Outcome: Missing}
	}
	return result
}

// Err returns an error if a test that passes directly does not pass through the plugin,
// or fails directly without a reason that known.yaml has.
func (c Comparison) Err() error {
	var errs []error
	if n := len(c.Lost); n > 0 {
		errs = append(errs, fmt.Errorf("%s: %d do not have the same result through the plugin", c.Set, n))
	}
	if n := len(c.Unknown); n > 0 {
		errs = append(errs, fmt.Errorf("%s: %d fail directly, and known.yaml does not say why", c.Set, n))
	}
	return errors.Join(errs...)
}

// Table returns comparisons as a table in Markdown.
func Table(comparisons []Comparison) string {
	var b strings.Builder
	b.WriteString("| tests | run | pass both ways | pass only directly | fail directly | skip themselves | directly | through the plugin |\n")
	b.WriteString("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, c := range comparisons {
		fails := len(c.Known) + len(c.Unknown)
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %.0f s | %.0f s |\n",
			c.Set, len(c.Both)+len(c.Lost)+fails, len(c.Both), len(c.Lost), fails, len(c.Skip), c.DirectSeconds, c.ThroughSeconds)
	}
	return b.String()
}

// Details returns what the table does not say: the names of all tests that do not pass
// both ways, and why.
func (c Comparison) Details() string {
	var b strings.Builder
	section := func(title string, pairs []Pair, describe func(Pair) string) {
		if len(pairs) == 0 {
			return
		}
		fmt.Fprintf(&b, "%s: %s:\n", c.Set, title)
		for _, p := range pairs {
			fmt.Fprintf(&b, "  %s\n    %s\n", p.Test, describe(p))
		}
	}
	each := func(p Pair) string {
		return fmt.Sprintf("directly: %s; through the plugin: %s", describe(p.Direct), describe(p.Through))
	}
	section("NOT THE SAME THROUGH THE PLUGIN", c.Lost, each)
	section("FAIL DIRECTLY, AND known.yaml DOES NOT SAY WHY", c.Unknown, each)
	section("fail directly, as known", c.Known, func(p Pair) string { return p.Reason })
	section("pass, although known.yaml says that they fail: remove them there", c.Stale, func(p Pair) string { return p.Reason })
	section("pass both ways when they are run again, alone", c.Again, each)
	section("skip themselves", c.Skip, func(p Pair) string { return describe(p.Direct) })
	return b.String()
}

// describe returns a result in a few words.
func describe(r Result) string {
	const most = 300
	if r.Reason == "" {
		return string(r.Outcome)
	}
	return fmt.Sprintf("%s (%.*s)", r.Outcome, most, r.Reason)
}
