// What a test has asked of the calls: to be counted, and to fail.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace standin {

class Faults {
public:
    // The `nth` use of the function from now on gives `code`.
    void plan(const std::string& name, unsigned nth, int code) { planned_[name].push_back({counts_[name] + nth, code}); }

    // Counts a use. What it is to fail with, or 0.
    int use(const std::string& name) {
        if (paused) {
            return 0;
        }
        const unsigned count = ++counts_[name];
        for (const Fault& fault : planned_[name]) {
            if (fault.at == count) {
                return fault.code;
            }
        }
        return 0;
    }

    bool paused = false;  // while the test itself makes calls

    unsigned count(const std::string& name) { return counts_[name]; }
    const std::map<std::string, unsigned>& counts() const { return counts_; }

private:
    struct Fault {
        unsigned at;
        int code;
    };

    std::map<std::string, unsigned> counts_;
    std::map<std::string, std::vector<Fault>> planned_;
};

Faults& faults();

}  // namespace standin
