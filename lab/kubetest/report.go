// SPDX-License-Identifier: Apache-2.0

package kubetest

import (
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/onsi/ginkgo/v2/reporters"
	"github.com/onsi/ginkgo/v2/types"
)

// Outcome is what became of a test.
type Outcome string

// The outcomes of a test. Missing means that the report does not have it.
const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped"
	Missing Outcome = "missing"
)

// Result is what a report says about one test.
type Result struct {
	Outcome Outcome
	// Reason is the first line of why it failed or was skipped.
	Reason string
}

// Report says what became of each test of a run, by its name.
type Report struct {
	Results map[string]Result
	Seconds float64
}

// specPrefix is what Ginkgo puts before the name of a test. Other entries of a report
// are about what runs before or after all tests.
const specPrefix = "[It] "

// What Ginkgo writes of a test that was not chosen, what it puts before the reason why a
// test skipped itself, and before that of a failure.
const (
	notChosen     = "skipped"
	skippedPrefix = "skipped - "
	failedPrefix  = "[FAILED] "
)

// ReadReport reads a JUnit file as Ginkgo writes it. A report without a test that ran is
// an error, and so is one of a run that failed outside of its tests.
func ReadReport(path string) (Report, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return Report{}, err
	}
	var suites reporters.JUnitTestSuites
	if err := xml.Unmarshal(content, &suites); err != nil {
		return Report{}, fmt.Errorf("%s: %w", path, err)
	}
	report := Report{Results: make(map[string]Result), Seconds: suites.Time}
	ran := 0
	for _, suite := range suites.TestSuites {
		// After a timeout of the whole, for example, tests that did not run look as if
		// they had skipped themselves.
		if why := suite.Properties.WithName("SpecialSuiteFailureReason"); why != "" {
			return Report{}, fmt.Errorf("%s: the run failed as a whole: %s", path, why)
		}
		for _, test := range suite.TestCases {
			result, err := resultOf(test)
			if err != nil {
				return Report{}, fmt.Errorf("%s: %s: %w", path, test.Name, err)
			}
			name, isSpec := strings.CutPrefix(test.Name, specPrefix)
			if !isSpec {
				if result.Outcome == Failed {
					return Report{}, fmt.Errorf("%s: %s failed: %s", path, test.Name, result.Reason)
				}
				continue
			}
			if _, twice := report.Results[name]; twice {
				return Report{}, fmt.Errorf("%s: two results of %q", path, name)
			}
			if result.Outcome == Skipped && result.Reason == notChosen {
				continue
			}
			report.Results[name] = result
			if result.Outcome != Skipped {
				ran++
			}
		}
	}
	if ran == 0 {
		return Report{}, fmt.Errorf("%s: no test ran: the expressions that choose tests may match none", path)
	}
	return report, nil
}

// resultOf returns the result of one entry. What is neither passed nor skipped has
// failed, as a timeout, an interruption or a panic is no success.
func resultOf(test reporters.JUnitTestCase) (Result, error) {
	switch test.Status {
	case types.SpecStatePassed.String():
		if test.Failure != nil || test.Error != nil {
			return Result{}, errors.New("both passed and failed")
		}
		return Result{Outcome: Passed}, nil
	case types.SpecStateSkipped.String(), types.SpecStatePending.String():
		if test.Skipped == nil {
			return Result{}, errors.New("skipped without an entry that says so")
		}
		return Result{Skipped, firstLine(strings.TrimPrefix(test.Skipped.Message, skippedPrefix))}, nil
	case "":
		return Result{}, errors.New("has no status")
	}
	reason := test.Status
	switch {
	case test.Failure != nil:
		reason = firstLine(test.Failure.Message, test.Failure.Description)
	case test.Error != nil:
		reason = firstLine(test.Error.Message, test.Error.Description)
	}
	return Result{Failed, strings.TrimPrefix(reason, failedPrefix)}, nil
}

// firstLine returns the first line that is not empty.
func firstLine(texts ...string) string {
	for _, text := range texts {
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" {
				return line
			}
		}
	}
	return ""
}

// Count returns how many tests have each outcome.
func (r Report) Count() map[Outcome]int {
	count := make(map[Outcome]int)
	for _, result := range r.Results {
		count[result.Outcome]++
	}
	return count
}
